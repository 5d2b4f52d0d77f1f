//! A network between a client and a PostgreSQL server that loses, delays, halves and doubles requests and answers, most of all those of `COMMIT`.
//!
//! It speaks the protocol as far as it must: a request is what a client sends up to a `Sync` (or a plain query), its answer is what the server says up to
//! `ReadyForQuery`. TCP delivers neither of them twice, and who gets one answer more than he asked for cannot tell whose it is if he waits for others;
//! so what is doubled is `COMMIT`, behind which nothing waits: it must end the connection, and never be taken for the answer to what is asked next.
#![allow(dead_code, reason = "every test takes what it needs of it")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on has failed")]

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::proxy::Dice;

/// What was done to requests that went through a [`Wire`].
#[derive(Debug, Default)]
pub(crate) struct Deeds {
    pub(crate) commits: AtomicU64,
    pub(crate) requests_lost: AtomicU64,
    pub(crate) requests_halved: AtomicU64,
    /// Requests that arrived after their connection was cut.
    pub(crate) requests_late: AtomicU64,
    pub(crate) requests_doubled: AtomicU64,
    pub(crate) answers_lost: AtomicU64,
    pub(crate) answers_halved: AtomicU64,
    /// Answers that came, but not soon.
    pub(crate) answers_late: AtomicU64,
    pub(crate) answers_doubled: AtomicU64,
    /// Set: the next `COMMIT` is passed on, and answered as a pooler does that has lost its server; nobody is let in after that until it is unset again.
    pub(crate) lose_server: AtomicBool,
    server_lost: AtomicBool,
    /// Set: the next commit is kept, and its client cut off; it is passed on when `go_on` says so, and then `arrived` says that the server has answered.
    pub(crate) hold: AtomicBool,
    pub(crate) go_on: tokio::sync::Notify,
    pub(crate) arrived: tokio::sync::Notify,
    /// How long every request takes on its way, milliseconds.
    pub(crate) way: AtomicU64,
}

impl Deeds {
    /// What was never done.
    pub(crate) fn undone(&self) -> Vec<&'static str> {
        let all = [
            ("requests lost", &self.requests_lost),
            ("requests halved", &self.requests_halved),
            ("requests late", &self.requests_late),
            ("requests doubled", &self.requests_doubled),
            ("answers lost", &self.answers_lost),
            ("answers halved", &self.answers_halved),
            ("answers late", &self.answers_late),
            ("answers doubled", &self.answers_doubled),
        ];
        all.into_iter().filter(|(_, deed)| deed.load(Ordering::Relaxed) == 0).map(|(name, _)| name).collect()
    }
}

/// How often something goes wrong, of a thousand requests.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Odds {
    pub(crate) commits: u64,
    pub(crate) others: u64,
}

/// The network. Ends when it is dropped.
pub(crate) struct Wire {
    pub(crate) port: u16,
    pub(crate) deeds: Arc<Deeds>,
    work: JoinHandle<()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Wire {
    /// Stands before a server.
    pub(crate) async fn before(server: u16, seed: u64, odds: Odds) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let deeds = Arc::new(Deeds::default());
        let kept = Arc::clone(&deeds);
        let work = tokio::spawn(async move {
            let mut connections = 0;
            while let Ok((client, _)) = listener.accept().await {
                if deeds.lose_server.load(Ordering::Acquire) && deeds.server_lost.load(Ordering::Acquire) {
                    continue;
                }
                connections += 1;
                let deeds = Arc::clone(&deeds);
                let dice = Dice::new(seed.wrapping_mul(1_000_003).wrapping_add(connections));
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    let line = Line { client, server, up: Vec::new(), down: Vec::new(), names: HashMap::new() };
                    let _ended = line.serve(dice, odds, &deeds).await.is_err();
                });
            }
        });
        Self { port, deeds: kept, work }
    }
}

/// One connection.
struct Line {
    client: TcpStream,
    server: TcpStream,
    /// What came from either side and was not passed on.
    up: Vec<u8>,
    down: Vec<u8>,
    /// The texts of prepared statements.
    names: HashMap<Vec<u8>, Vec<u8>>,
}

/// The whole message at the front of what was read: its kind and its length with everything.
fn message(bytes: &[u8]) -> Option<(u8, usize)> {
    let length = 1 + usize::try_from(u32::from_be_bytes(bytes.get(1..5)?.try_into().unwrap())).unwrap();
    (bytes.len() >= length).then_some((bytes[0], length))
}

/// The texts at the front of a message's body, each with a NUL behind it.
fn texts(body: &[u8]) -> (&[u8], &[u8]) {
    let mut parts = body.split(|byte| *byte == 0);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

impl Line {
    async fn serve(mut self, mut dice: Dice, odds: Odds, deeds: &Deeds) -> Result<()> {
        self.client.set_nodelay(true)?;
        self.server.set_nodelay(true)?;
        self.greet().await?;
        loop {
            let Some((request, is_commit)) = self.request() else {
                tokio::select! {
                    read = self.client.read_buf(&mut self.up) => some(read?)?,
                    read = self.server.read_buf(&mut self.down) => {
                        some(read?)?;
                        // Told without a question: that others have committed, or that the server goes down.
                        let told = std::mem::take(&mut self.down);
                        self.client.write_all(&told).await?;
                    }
                }
                continue;
            };
            if is_commit {
                deeds.commits.fetch_add(1, Ordering::Relaxed);
            }
            tokio::time::sleep(Duration::from_millis(deeds.way.load(Ordering::Relaxed))).await;
            if is_commit && deeds.lose_server.load(Ordering::Acquire) {
                deeds.server_lost.store(true, Ordering::Release);
                self.ask(&request).await?;
                return self.client.write_all(&lost_server()).await;
            }
            if is_commit && deeds.hold.swap(false, Ordering::AcqRel) {
                self.client.shutdown().await?;
                deeds.go_on.notified().await;
                let answered = self.ask(&request).await.map(|_| ());
                deeds.arrived.notify_one();
                return answered;
            }
            let odds = if is_commit { odds.commits } else { odds.others };
            if dice.below(1000) >= odds {
                let answer = self.ask(&request).await?;
                self.client.write_all(&answer).await?;
            } else if !self.harm(request, is_commit, &mut dice, deeds).await? {
                return Ok(());
            }
        }
    }

    /// Passes on whatever is said until the server is ready for the first time.
    async fn greet(&mut self) -> Result<()> {
        loop {
            let mut passed = 0;
            let mut ready = false;
            while let Some((kind, length)) = message(&self.down[passed..]) {
                passed += length;
                ready |= kind == b'Z';
            }
            let told: Vec<u8> = self.down.drain(..passed).collect();
            self.client.write_all(&told).await?;
            if ready {
                return Ok(());
            }
            tokio::select! {
                read = self.client.read_buf(&mut self.up) => {
                    some(read?)?;
                    let said = std::mem::take(&mut self.up);
                    self.server.write_all(&said).await?;
                }
                read = self.server.read_buf(&mut self.down) => some(read?)?,
            }
        }
    }

    /// The whole request at the front of what the client said, and whether it is a `COMMIT`.
    fn request(&mut self) -> Option<(Vec<u8>, bool)> {
        let (mut at, mut is_commit) = (0, false);
        loop {
            let (kind, length) = message(&self.up[at..])?;
            let body = &self.up[at + 5..at + length];
            match kind {
                b'P' => {
                    let (name, text) = texts(body);
                    self.names.insert(name.to_vec(), text.to_vec());
                }
                b'B' => is_commit |= self.names.get(texts(body).1).is_some_and(|text| commits(text)),
                b'Q' => is_commit |= commits(texts(body).0),
                _ => {}
            }
            at += length;
            if matches!(kind, b'S' | b'Q' | b'X') {
                return Some((self.up.drain(..at).collect(), is_commit));
            }
        }
    }

    /// Asks the server, and gives its whole answer.
    async fn ask(&mut self, request: &[u8]) -> Result<Vec<u8>> {
        self.server.write_all(request).await?;
        let mut at = 0;
        loop {
            while let Some((kind, length)) = message(&self.down[at..]) {
                at += length;
                if kind == b'Z' {
                    return Ok(self.down.drain(..at).collect());
                }
            }
            some(self.server.read_buf(&mut self.down).await?)?;
        }
    }

    /// Does something to a request; whether the connection lives on.
    async fn harm(&mut self, request: Vec<u8>, is_commit: bool, dice: &mut Dice, deeds: &Deeds) -> Result<bool> {
        let count = |deed: &AtomicU64| {
            deed.fetch_add(1, Ordering::Relaxed);
        };
        let pause = Duration::from_millis(dice.below(300));
        // The last two are for commits only.
        match dice.below(if is_commit { 8 } else { 6 }) {
            0 => {
                count(&deeds.requests_lost);
                Ok(false)
            }
            1 => {
                count(&deeds.requests_halved);
                self.server.write_all(&request[..request.len() / 2]).await?;
                Ok(false)
            }
            2 => {
                count(&deeds.requests_late);
                self.client.shutdown().await?;
                tokio::time::sleep(pause).await;
                self.ask(&request).await?;
                Ok(false)
            }
            3 => {
                count(&deeds.answers_lost);
                self.ask(&request).await?;
                Ok(false)
            }
            4 => {
                count(&deeds.answers_halved);
                let answer = self.ask(&request).await?;
                self.client.write_all(&answer[..answer.len() / 2]).await?;
                Ok(false)
            }
            5 => {
                count(&deeds.answers_late);
                let answer = self.ask(&request).await?;
                tokio::time::sleep(pause).await;
                self.client.write_all(&answer).await?;
                Ok(true)
            }
            6 => {
                count(&deeds.requests_doubled);
                let mut answers = self.ask(&[request.as_slice(), request.as_slice()].concat()).await?;
                answers.extend(self.ask(&[]).await?);
                self.client.write_all(&answers).await?;
                Ok(true)
            }
            _ => {
                count(&deeds.answers_doubled);
                let answer = self.ask(&request).await?;
                self.client.write_all(&[answer.as_slice(), answer.as_slice()].concat()).await?;
                Ok(true)
            }
        }
    }
}

/// Whether a statement is the last of its transaction, and that one writes: a `COMMIT`, or a batch that goes down at once.
fn commits(text: &[u8]) -> bool {
    text == b"COMMIT" || text.starts_with(b"WITH drawn AS ")
}

/// A pooler's last words to a client.
fn lost_server() -> Vec<u8> {
    let fields = b"SFATAL\0VFATAL\0C08P01\0Mserver conn crashed?\0\0";
    let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
    [&b"E"[..], &length, fields].concat()
}

/// The end of a stream is an error here.
fn some(read: usize) -> Result<()> {
    if read == 0 { Err(Error::from(ErrorKind::UnexpectedEof)) } else { Ok(()) }
}
