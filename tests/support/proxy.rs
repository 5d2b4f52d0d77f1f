//! Networks between a client and a server of HTTP: one that loses, delays, halves and doubles what goes through it, and one that encrypts.
#![allow(dead_code, reason = "every test takes what it needs of it")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A number that depends on nothing but the seed and what was rolled before.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub(crate) fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % most
    }
}

/// What was done to the exchanges that went through a [`Faulty`] network.
#[derive(Debug, Default)]
pub(crate) struct Deeds {
    pub(crate) whole: AtomicU64,
    pub(crate) requests_lost: AtomicU64,
    pub(crate) answers_lost: AtomicU64,
    pub(crate) halved: AtomicU64,
    /// Requests that arrived twice.
    pub(crate) doubled: AtomicU64,
    pub(crate) answers_doubled: AtomicU64,
    /// Requests that arrived after they were given up.
    pub(crate) late: AtomicU64,
    /// Answers that came, but not soon.
    pub(crate) answers_late: AtomicU64,
}

/// A network that lies, by a seed. Ends when it is dropped.
pub(crate) struct Faulty {
    port: u16,
    pub(crate) deeds: Arc<Deeds>,
    work: JoinHandle<()>,
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Faulty {
    /// Stands before a server; of a hundred exchanges `faults` go wrong.
    pub(crate) async fn before(server: u16, seed: u64, faults: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let deeds = Arc::new(Deeds::default());
        let kept = Arc::clone(&deeds);
        let work = tokio::spawn(async move {
            let mut connections = 0;
            while let Ok((client, _)) = listener.accept().await {
                connections += 1;
                let deeds = Arc::clone(&deeds);
                let dice = Dice::new(seed.wrapping_add(connections));
                tokio::spawn(async move {
                    let _ended = serve(client, server, dice, faults, &deeds).await.is_err();
                });
            }
        });
        Self { port, deeds: kept, work }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// Serves one connection, exchange by exchange, until something goes wrong with it.
async fn serve(mut client: TcpStream, server: u16, mut dice: Dice, faults: u64, deeds: &Deeds) -> std::io::Result<()> {
    let count = |deed: &AtomicU64| {
        deed.fetch_add(1, Ordering::Relaxed);
    };
    client.set_nodelay(true)?;
    while let Some(request) = message(&mut client).await? {
        if dice.below(100) >= faults {
            count(&deeds.whole);
            client.write_all(&exchange(server, &request).await?).await?;
            continue;
        }
        let pause = Duration::from_millis(dice.below(300));
        match dice.below(9) {
            0 => {
                count(&deeds.requests_lost);
                return Ok(());
            }
            1 => {
                count(&deeds.halved);
                let mut half = TcpStream::connect(("127.0.0.1", server)).await?;
                half.write_all(&request[..request.len() / 2]).await?;
                return Ok(());
            }
            2 => {
                count(&deeds.halved);
                let answer = exchange(server, &request).await?;
                client.write_all(&answer[..answer.len() / 2]).await?;
                return Ok(());
            }
            3 => {
                count(&deeds.answers_lost);
                exchange(server, &request).await?;
                return Ok(());
            }
            4 => {
                // The connection is cut, and the request arrives after its sender has given it up.
                count(&deeds.late);
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    let _nobody_waits = exchange(server, &request).await.is_err();
                });
                return Ok(());
            }
            5 => {
                count(&deeds.doubled);
                let (first, second) = tokio::join!(exchange(server, &request), exchange(server, &request));
                let answer = if dice.below(2) == 0 { first? } else { second? };
                client.write_all(&answer).await?;
            }
            6 => {
                count(&deeds.answers_late);
                let answer = exchange(server, &request).await?;
                tokio::time::sleep(pause).await;
                client.write_all(&answer).await?;
            }
            7 => {
                // The second copy answers nothing that was asked: it must not be taken for the answer to what is asked next.
                count(&deeds.answers_doubled);
                let answer = exchange(server, &request).await?;
                client.write_all(&[answer.as_slice(), answer.as_slice()].concat()).await?;
            }
            _ => {
                // Answered, and once more later.
                count(&deeds.doubled);
                client.write_all(&exchange(server, &request).await?).await?;
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    let _nobody_waits = exchange(server, &request).await.is_err();
                });
            }
        }
    }
    Ok(())
}

/// A network that swallows the answer to the first large request, without a word; the connection stays. Ends when it is dropped.
pub(crate) struct Swallowing {
    port: u16,
    pub(crate) swallowed: Arc<Notify>,
    work: JoinHandle<()>,
}

impl Drop for Swallowing {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Swallowing {
    /// Stands before a server; requests of more bytes than these are large.
    pub(crate) async fn before(server: u16, most: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let swallowed = Arc::new(Notify::new());
        let told = Arc::clone(&swallowed);
        let work = tokio::spawn(async move {
            let first = Arc::new(AtomicBool::new(true));
            while let Ok((mut client, _)) = listener.accept().await {
                let (told, first) = (Arc::clone(&told), Arc::clone(&first));
                tokio::spawn(async move {
                    while let Ok(Some(request)) = message(&mut client).await {
                        let Ok(answer) = exchange(server, &request).await else { return };
                        if request.len() > most && first.swap(false, Ordering::SeqCst) {
                            told.notify_one();
                            continue;
                        }
                        if client.write_all(&answer).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { port, swallowed, work }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// One request and its answer, on a connection of its own.
async fn exchange(server: u16, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", server)).await?;
    stream.set_nodelay(true)?;
    stream.write_all(request).await?;
    message(&mut stream).await?.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))
}

/// A whole message of HTTP/1.1; none at the end of the stream.
async fn message(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        if let Some(length) = whole(&bytes) {
            bytes.truncate(length);
            return Ok(Some(bytes));
        }
        let read = stream.read(&mut chunk).await?;
        if read == 0 {
            let kind = std::io::ErrorKind::UnexpectedEof;
            return if bytes.is_empty() { Ok(None) } else { Err(kind.into()) };
        }
        bytes.extend_from_slice(&chunk[..read]);
    }
}

/// How long the message is, if all of it is there.
fn whole(bytes: &[u8]) -> Option<usize> {
    let head = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    let header = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    if header("transfer-encoding").is_some_and(|value| value.contains("chunked")) {
        let end = bytes[head..].windows(5).position(|five| five == b"0\r\n\r\n")?;
        return Some(head + end + 5);
    }
    let length = head + header("content-length").map_or(0, |value| value.parse::<usize>().unwrap());
    (bytes.len() >= length).then_some(length)
}

/// Encryption in front of a server that speaks none. Ends when it is dropped.
pub(crate) struct Tls {
    pub(crate) port: u16,
    work: JoinHandle<()>,
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Tls {
    /// Stands before a server, with the certificate `server.pem` and the key `server.key` of a folder.
    pub(crate) async fn before(server: u16, folder: &Path) -> Self {
        let certificates: Vec<_> =
            CertificateDer::pem_file_iter(folder.join("server.pem")).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let work = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut client) = acceptor.accept(client).await else { return };
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    let _ended = tokio::io::copy_bidirectional(&mut client, &mut server).await.is_err();
                });
            }
        });
        Self { port, work }
    }
}
