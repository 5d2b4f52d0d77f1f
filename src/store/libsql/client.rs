//! One request to the server: encrypted or not, with a deadline, and with a clear word about what its failure means.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tower_service::Service;

use super::fault::{Class, Fault, short};
use super::hrana::{Batch, BatchResult, Pipeline, read_answer};
use super::piecemeal::{Piecemeal, SOCKET, Sending};
use super::url::{Secret, Target};
use crate::store::engine::Engine;
use crate::store::{StoreError, StoreErrorKind};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(3);

/// How long the answer to a small request may take to begin: more than the 5 s after which the server ends a transaction by itself. Also how long an answer
/// that has begun may stand still.
pub(super) const USUAL: Duration = Duration::from_secs(10);

/// How long an answer may take that goes on.
const LONGEST: Duration = Duration::from_secs(300);

/// Answers are read up to here; the server's own limit is about a third of it.
const MAX_ANSWER: usize = 32 * 1024 * 1024;

/// Idle connections are given up before proxies and servers usually do.
const IDLE: Duration = Duration::from_secs(20);

type Http = legacy::Client<InTime<HttpsConnector<HttpConnector>>, Piecemeal>;

/// A connector with a limit for all that a connection needs: looking the name up, TCP, TLS.
#[derive(Clone)]
struct InTime<C>(C);

impl<C> Service<Uri> for InTime<C>
where
    C: Service<Uri, Error = Box<dyn StdError + Send + Sync>>,
    C::Future: Send + 'static,
    C::Response: 'static,
{
    type Response = C::Response;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, C::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move {
            match tokio::time::timeout(CONNECT, connecting).await {
                Ok(connected) => connected,
                Err(_) => Err(format!("it takes longer than {} s", CONNECT.as_secs()).into()),
            }
        })
    }
}

/// A client of one server. Its connections are its own, and live on a thread of its own.
pub(super) struct Client {
    engine: Engine,
    line: Arc<Line>,
    uri: Uri,
    authorization: Option<HeaderValue>,
    token: Option<Secret>,
    place: String,
    /// The newest state of the primary that an answer told of; replicas are asked to have reached it.
    replication: AtomicU64,
}

/// What an exchange needs.
struct Line {
    http: Http,
    tried: String,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Client {
    /// A client; nothing is connected yet.
    pub(super) fn new(target: &Target) -> Result<Self, StoreError> {
        let place = target.location();
        let fail = |why: &dyn fmt::Display| StoreError::not_applied(StoreErrorKind::Input, format!("{place}: {why}"));
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_keepalive(Some(IDLE));
        // What is on the way and not taken: a large request may be long under way, but not stand still.
        tcp.set_tcp_user_timeout(Some(USUAL));
        tcp.set_send_buffer_size(Some(SOCKET));
        let tls = tls_config(target.ca_file.as_deref())?;
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls);
        let connector = if target.tls { connector.https_only() } else { connector.https_or_http() };
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .build(InTime(connector.enable_http1().wrap_connector(tcp)));
        let scheme = if target.tls { "https" } else { "http" };
        let uri = Uri::builder()
            .scheme(scheme)
            .authority(target.authority())
            .path_and_query("/v3/pipeline")
            .build()
            .map_err(|error| fail(&error))?;
        let authorization = target
            .token
            .as_ref()
            .map(|token| {
                let mut value = HeaderValue::try_from(format!("Bearer {}", token.reveal()))
                    .map_err(|_| fail(&"the token holds characters that no token has"))?;
                value.set_sensitive(true);
                Ok::<_, StoreError>(value)
            })
            .transpose()?;
        let tried = format!("{}:{}", target.host, target.port);
        let line = Arc::new(Line { http, tried });
        let token = target.token.clone();
        let engine = Engine::start("seeknal-libsql")?;
        Ok(Self { engine, line, uri, authorization, token, place, replication: AtomicU64::new(0) })
    }

    /// The server, for people.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The newest state of the primary that is known, for reads; none if the server tells none.
    pub(super) fn replication(&self) -> Option<u64> {
        Some(self.replication.load(Ordering::Relaxed)).filter(|index| *index > 0)
    }

    /// Sends one batch in one request, and reads the answer. `within`: how long the server may work on it.
    pub(super) async fn send(&self, batch: &Batch<'_>, within: Duration) -> Result<BatchResult, Fault> {
        let body = serde_json::to_vec(&Pipeline(batch)).map_err(|error| Fault::new(Class::Refused, error))?;
        let (body, sending) = Piecemeal::new(body.into());
        let request = self.request(body)?;
        let line = Arc::clone(&self.line);
        let answer = self.engine.spawn(async move { line.exchange(request, sending, within).await }).await;
        let body = answer.unwrap_or_else(|_| Err(Fault::new(Class::Lost, "the state was closed meanwhile")));
        self.read(batch, body).map_err(|fault| fault.without(self.token.as_ref().map(Secret::reveal)))
    }

    fn read(&self, batch: &Batch<'_>, body: Result<Bytes, Fault>) -> Result<BatchResult, Fault> {
        let body = body.map_err(|fault| match fault.class {
            // What was written may have been committed before its answer was put into words.
            Class::Garbled if batch.writes => lost(&fault, fault.message()),
            _ => fault,
        });
        let mut result = match read_answer(&body?) {
            Ok(Ok(result)) => result,
            // The batch as a whole failed. Parts of it may have run: only where the server did not take it at all is that certain.
            Ok(Err(error)) => {
                let fault = Fault::of_statement(&error);
                let certain =
                    matches!(error.code(), "SQL_PARSE_ERROR" | "SQL_INPUT_ERROR" | "ARGS_INVALID" | "RESPONSE_TOO_LARGE")
                        || matches!(fault.class, Class::NoAccess | Class::ReadOnly);
                return Err(if certain || !batch.writes { fault } else { lost(&fault, &error.message) });
            }
            Err(why) => return Err(Fault::new(Class::Lost, format_args!("its answer cannot be read: {}", short(&why)))),
        };
        if let Some(token) = &self.token {
            result.hide(token.reveal());
        }
        if let Some(index) = result.replication_index {
            self.replication.fetch_max(index.0, Ordering::Relaxed);
        }
        Ok(result)
    }

    fn request(&self, body: Piecemeal) -> Result<Request<Piecemeal>, Fault> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .body(body)
            .map_err(|error| Fault::new(Class::Refused, error))?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }

    /// Gives up its connections; nothing is sent any more.
    pub(super) fn stop(&self) {
        self.engine.stop();
    }

    /// Starts something beside the requests.
    pub(super) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
        self.engine.spawn(work)
    }

    /// Runs something beside the requests, to its end, whoever waits for it.
    pub(super) async fn beside<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
        self.engine.spawn(work).await.ok()
    }
}

impl Line {
    /// Sends, waits for the answer to begin, and reads it as long as more of it comes.
    async fn exchange(&self, request: Request<Piecemeal>, sending: Sending, within: Duration) -> Result<Bytes, Fault> {
        let began = tokio::time::Instant::now();
        let answering = sending.answered(self.http.request(request), within).await;
        let Some(begun) = answering else {
            let why = format_args!("no answer from {} within {} s", self.tried, began.elapsed().as_secs());
            return Err(Fault::new(Class::Lost, why));
        };
        let response = begun.map_err(|error| self.not_exchanged(&error))?;
        let status = response.status();
        let body = tokio::time::timeout(LONGEST, whole(response.into_body())).await;
        let body = body.unwrap_or_else(|_| Err(format!("it did not end within {} s", LONGEST.as_secs())));
        if status == StatusCode::OK {
            return body.map_err(|why| Fault::new(Class::Lost, format_args!("its answer broke off: {}", short(&why))));
        }
        // Whatever it says beside the status is a hint for people only.
        let says = body.map(|body| short(String::from_utf8_lossy(&body).trim())).unwrap_or_default();
        Err(refused(status, &says))
    }

    fn not_exchanged(&self, error: &legacy::Error) -> Fault {
        let causes = causes(error);
        if !error.is_connect() {
            return Fault::new(Class::Lost, format_args!("the connection to {} broke off: {causes}", self.tried));
        }
        let class = if is_untrusted(error) { Class::Untrusted } else { Class::NotSent };
        Fault::new(
            class,
            format_args!("could not connect to {} (given up after {} s at most): {causes}", self.tried, CONNECT.as_secs()),
        )
    }
}

/// A whole answer, as long as it does not stand still.
async fn whole(body: Incoming) -> Result<Bytes, String> {
    let (mut body, mut bytes) = (Limited::new(body, MAX_ANSWER), Vec::new());
    loop {
        match tokio::time::timeout(USUAL, body.frame()).await {
            Err(_) => return Err(format!("nothing more of it came within {} s", USUAL.as_secs())),
            Ok(None) => return Ok(bytes.into()),
            Ok(Some(frame)) => {
                let frame = frame.map_err(|error| error.to_string())?;
                bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            }
        }
    }
}

fn lost(fault: &Fault, message: &str) -> Fault {
    let class = if fault.class == Class::Busy { Class::AtCommit } else { Class::Lost };
    Fault::new(class, format_args!("the batch failed: {}", short(message)))
}

/// What a status other than 200 means.
fn refused(status: StatusCode, says: &str) -> Fault {
    let class = match status.as_u16() {
        401 => Class::NoAccess,
        403 => Class::ReadOnly,
        413 => Class::TooLarge,
        429 => Class::Busy,
        500 if says.contains("invalid utf-8") => Class::Garbled,
        // The server turned it away before it looked at the statements.
        300..=399 | 400 | 402 | 404..=407 | 410..=428 | 431..=499 => Class::Refused,
        _ => Class::Lost,
    };
    let says = if says.is_empty() { String::new() } else { format!(": {says}") };
    Fault::new(class, format_args!("it answers {status}{says}"))
}

/// The error and all that caused it, in one line.
fn causes(error: &(dyn StdError + 'static)) -> String {
    let mut line = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !line.ends_with(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
        next = error.source();
    }
    short(&line)
}

/// Whether the encryption failed, and not the way to the server.
fn is_untrusted(error: &(dyn StdError + 'static)) -> bool {
    if error.is::<rustls::Error>() {
        return true;
    }
    // An error of the system tells what it wraps by another way than what caused it.
    let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    wrapped.is_some_and(|wrapped| is_untrusted(wrapped)) || error.source().is_some_and(is_untrusted)
}

/// How servers are trusted: by the public authorities, or by those of a file.
fn tls_config(ca_file: Option<&Path>) -> Result<ClientConfig, StoreError> {
    // A provider of our own: the process-wide default belongs to the embedder.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let bad = |why: &dyn fmt::Display| StoreError::not_applied(StoreErrorKind::Input, format!("setting up TLS: {why}"));
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(|error| bad(&error))?;
    let Some(path) = ca_file else {
        use hyper_rustls::ConfigBuilderExt;
        return Ok(builder.with_webpki_roots().with_no_client_auth());
    };
    let bad = |why: &dyn fmt::Display| {
        StoreError::not_applied(StoreErrorKind::Input, format!("database_ca_file {}: {why}; name a PEM file", path.display()))
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| bad(&error))? {
        let certificate = certificate.map_err(|error| bad(&error))?;
        roots.add(certificate).map_err(|error| bad(&error))?;
    }
    if roots.is_empty() {
        return Err(bad(&"it holds no certificate"));
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::libsql::fake::client;

    /// What becomes of an answer whose bytes come one by one, `apart` from one another.
    async fn dripping(apart: Duration) -> Result<Bytes, Fault> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap().port());
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _request = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n").await.unwrap();
            for byte in b"slow" {
                tokio::time::sleep(apart).await;
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let (body, sending) = Piecemeal::new(Bytes::from_static(b"{}"));
        let request = client.request(body).unwrap();
        tokio::select! {
            answer = client.line.exchange(request, sending, USUAL) => answer,
            () = server => unreachable!(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_may_take_long_but_not_stand_still() {
        assert_eq!(dripping(USUAL / 3).await.unwrap(), "slow");
        assert_eq!(dripping(USUAL * 2).await.unwrap_err().class, Class::Lost);
    }

    /// How long is waited for the answer to a request of so many bytes, all of which the server takes.
    async fn unanswered(bytes: usize) -> Duration {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = client(listener.local_addr().unwrap().port());
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut taken = vec![0; 64 * 1024];
            while stream.read(&mut taken).await.is_ok_and(|read| read > 0) {}
            std::future::pending::<()>().await;
        };
        let (body, sending) = Piecemeal::new(vec![b' '; bytes].into());
        let request = client.request(body).unwrap();
        let began = tokio::time::Instant::now();
        tokio::select! {
            answer = client.line.exchange(request, sending, USUAL) => assert_eq!(answer.unwrap_err().class, Class::Lost),
            () = server => unreachable!(),
        }
        began.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn the_size_of_a_request_that_was_taken_gives_its_answer_no_time() {
        assert!(unanswered(2_000).await < USUAL * 2);
        let long = unanswered(16 * 1024 * 1024).await;
        assert!(long < USUAL * 2, "{long:?}: leases run out after 30 s");
    }
}
