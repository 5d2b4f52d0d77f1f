//! Opening: tokens, certificates, hosts that are not there, and what lies at the server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use seeknal_state::{
    BackendOptions, Coordinator, Error, NewRun, NodeUpdate, RunId, StateBackend, StoreError, StoreErrorKind, create_state_backend,
};

use super::proxy::Tls;
use super::sqld::{Sqld, certificates};

pub(super) fn backend(options: &BackendOptions) -> Arc<dyn StateBackend> {
    create_state_backend("database", options).unwrap()
}

pub(super) fn options(url: &str) -> BackendOptions {
    BackendOptions::new().database_url(url)
}

/// Nothing that anybody may see has a token in it.
pub(super) fn assert_hidden(token: &str, shown: &[String]) {
    for text in shown {
        for part in token.split('.').filter(|part| part.len() > 8) {
            assert!(!text.contains(part), "a token is shown: {text}");
        }
    }
}

pub(super) async fn refused(options: &BackendOptions, token: &str) -> StoreError {
    let backend = backend(options);
    let error = backend.initialize().await.unwrap_err();
    let source = std::error::Error::source(&error).map(|source| format!("{source} {source:?}")).unwrap_or_default();
    assert_hidden(token, &[error.to_string(), format!("{error:?}"), source, backend.location(), format!("{backend:?}")]);
    assert!(!error.is_unknown_outcome(), "{error}");
    error
}

#[tokio::test]
async fn a_right_token_opens_and_the_others_say_what_is_wrong() {
    let Some(server) = Sqld::with_tokens() else { return };
    let port = server.port();
    let rw = server.token(r#"{"a":"rw"}"#);
    let url = format!("libsql://{rw}@127.0.0.1:{port}?tls=0");

    let state = Coordinator::open(backend(&options(&url))).await.unwrap();
    state.create_run("run", NewRun::running()).await.unwrap();
    state.set_node_state("run", "n", NodeUpdate::success()).await.unwrap();
    assert_eq!(state.backend().location(), format!("http://127.0.0.1:{port}"));
    assert_hidden(&rw, &[format!("{state:?}"), format!("{:?}", state.backend()), state.backend().location()]);
    state.close().await.unwrap();

    // The same one from its other places.
    let plain = format!("http://127.0.0.1:{port}");
    for options in [options(&format!("{plain}?authToken={rw}")), options(&plain).set("database_token", &rw)] {
        let state = Coordinator::open(backend(&options)).await.unwrap();
        assert!(state.get_run("run").await.unwrap().unwrap().node("n").is_some());
        state.close().await.unwrap();
    }

    let expired = server.token(r#"{"a":"rw","exp":1000000}"#);
    let foreign = Sqld::with_tokens().unwrap().token(r#"{"a":"rw"}"#);
    for (token, says) in [(expired.as_str(), "expired"), (foreign.as_str(), "401"), ("nonsense-nonsense", "401"), ("", "401")] {
        let error = refused(&options(&format!("{plain}?tls=0")).set("database_token", token), token).await;
        assert_eq!(error.kind(), StoreErrorKind::Input, "{error}");
        for told in [says, "database_url", "SEEKNAL_DATABASE_TOKEN", "the option database_token"] {
            assert!(error.to_string().contains(told), "{error}");
        }
    }
}

#[tokio::test]
async fn a_token_that_only_reads_reads() {
    let Some(server) = Sqld::with_tokens() else { return };
    let url = format!("http://127.0.0.1:{}", server.port());
    let (rw, ro) = (server.token(r#"{"a":"rw"}"#), server.token(r#"{"a":"ro"}"#));

    let empty = refused(&options(&url).set("database_token", &ro), &ro).await;
    assert_eq!(empty.kind(), StoreErrorKind::ReadOnly, "{empty}");

    let state = Coordinator::open(backend(&options(&url).set("database_token", &rw))).await.unwrap();
    state.create_run("run", NewRun::running()).await.unwrap();
    state.close().await.unwrap();

    let state = Coordinator::open(backend(&options(&url).set("database_token", &ro))).await.unwrap();
    assert!(state.get_run("run").await.unwrap().is_some());
    let error = state.set_node_state("run", "n", NodeUpdate::success()).await.unwrap_err();
    let Error::Store(error) = error else { panic!("{error}") };
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::ReadOnly, false), "{error}");
    assert!(error.to_string().contains("token that may write"), "{error}");
    assert_hidden(&ro, &[error.to_string(), format!("{error:?}")]);
    state.close().await.unwrap();

    let reader = backend(&options(&url).set("database_token", &ro).read_only(true));
    reader.initialize().await.unwrap();
    assert!(reader.is_read_only());
    assert!(reader.load_run(&RunId::new("run").unwrap()).await.unwrap().unwrap().node("n").is_none());
}

#[tokio::test]
async fn a_host_that_is_not_there_is_told_in_time() {
    // A port where nobody listens: it is kept, or the next one might.
    let kept = tokio::net::TcpSocket::new_v4().unwrap();
    kept.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = kept.local_addr().unwrap().port();
    let error = refused(&options(&format!("http://127.0.0.1:{port}")), "").await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");

    // A name that no one has.
    let error = refused(&options("libsql://no-such-host.invalid"), "").await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    assert!(error.to_string().contains("no-such-host.invalid"), "{error}");

    // A host that takes connections and says nothing: its queue is full.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = listener.local_addr().unwrap();
    let socket = options(&format!("https://{silent}"));
    let began = Instant::now();
    let error = refused(&socket, "").await;
    assert!(error.is_retryable() && began.elapsed() < Duration::from_secs(20), "{error} after {:?}", began.elapsed());
}

#[tokio::test]
async fn what_is_no_libsql_server_is_told() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let answers: &[&[u8]] = &[
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\n\r\nnot here\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n\xff\xfehi!",
        b"HTTP/1.1 301 Moved Permanently\r\nlocation: https://example.com/\r\ncontent-length: 0\r\n\r\n",
    ];
    for answer in answers {
        let serve = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let _length = stream.read(&mut request).await.unwrap();
                stream.write_all(answer).await.unwrap();
            }
        };
        let options = options(&url);
        let error = tokio::select! {
            error = refused(&options, "") => error,
            () = serve => unreachable!(),
        };
        assert!(!error.to_string().is_empty() && error.to_string().contains(&url), "{error}");
    }
}

#[tokio::test]
async fn databases_of_others_and_of_newer_versions_are_left_alone() {
    let Some(server) = Sqld::start() else { return };
    server.sql("CREATE TABLE somebody_elses (a)");
    let error = refused(&server.options(), "").await;
    assert_eq!(error.kind(), StoreErrorKind::Foreign);
    assert!(error.to_string().contains("somebody_elses"), "{error}");
    server.sql("DROP TABLE somebody_elses");

    let reader = refused(&server.options().read_only(true), "").await;
    assert_eq!(reader.kind(), StoreErrorKind::NotFound, "a reader makes nothing: {reader}");
    let open = Coordinator::open(backend(&server.options())).await.unwrap();
    open.create_run("run", NewRun::running()).await.unwrap();

    // Somebody brings the schema forward while this one has it open.
    server.sql("UPDATE seeknal_schema SET version = 99");
    let error = open.set_node_state("run", "n", NodeUpdate::success()).await.unwrap_err();
    assert!(matches!(&error, Error::Store(error) if error.kind() == StoreErrorKind::NewerFormat), "{error}");
    let error = refused(&server.options(), "").await;
    assert_eq!(error.kind(), StoreErrorKind::NewerFormat);
    assert!(error.to_string().contains("99"), "{error}");
    assert!(server.sql("SELECT count(*) FROM node_states").contains(r#""value":"0""#), "nothing was changed");
}

#[tokio::test]
async fn openings_at_the_same_time_make_the_tables_once() {
    let Some(server) = Sqld::start() else { return };
    let openings: Vec<_> = (0..8).map(|_| backend(&server.options())).collect();
    let mut all = tokio::task::JoinSet::new();
    for backend in openings {
        all.spawn(async move { backend.initialize().await });
    }
    while let Some(opened) = all.join_next().await {
        opened.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encryption_is_checked() {
    let Some(server) = Sqld::with_tokens() else { return };
    let token = server.token(r#"{"a":"rw"}"#);
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path(), "DNS:localhost");
    let ca = folder.path().join("ca.pem").to_string_lossy().into_owned();
    let front = Tls::before(server.port(), folder.path()).await;
    let port = front.port;

    let trusted = options(&format!("libsql://{token}@localhost:{port}")).set("database_ca_file", &ca);
    let state = Coordinator::open(backend(&trusted)).await.unwrap();
    state.create_run("run", NewRun::running()).await.unwrap();
    state.close().await.unwrap();

    let unknown = refused(&options(&format!("libsql://{token}@localhost:{port}")), &token).await;
    let other_name = refused(&options(&format!("libsql://{token}@127.0.0.1:{port}")).set("database_ca_file", &ca), &token).await;
    for error in [unknown, other_name] {
        assert_eq!(error.kind(), StoreErrorKind::Input, "{error}");
        assert!(error.to_string().contains("certificate"), "{error}");
    }
    let plain = refused(&options(&format!("libsql://{token}@127.0.0.1:{}", server.port())), &token).await;
    assert!(!plain.to_string().is_empty());
    let no_file =
        refused(&options(&format!("libsql://{token}@localhost:{port}")).set("database_ca_file", "/no/such/file"), &token).await;
    assert_eq!(no_file.kind(), StoreErrorKind::Input);
    assert!(no_file.to_string().contains("database_ca_file"), "{no_file}");
}

#[tokio::test]
async fn a_server_that_repeats_the_token_does_not_bring_it_into_an_error() {
    const TOKEN: &str = "eyJhbGciOiJFZERTQSJ9.s3cret-of-the-tests.s1gnature-of-the-tests";
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let json = format!(r#"{{"message":"no statement for {TOKEN}","code":"SQL_PARSE_ERROR"}}"#);
    let step = format!(
        r#"{{"baton":null,"base_url":null,"results":[{{"type":"ok","response":{{"type":"batch","result":{{"step_results":[null,null,null,null],"step_errors":[null,{json},null,null]}}}}}},{{"type":"ok","response":{{"type":"close"}}}}]}}"#
    );
    let whole = format!(r#"{{"baton":null,"base_url":null,"results":[{{"type":"error","error":{json}}}]}}"#);
    for (status, body) in [
        ("400 Bad Request", format!("cannot read the header Bearer {TOKEN}")),
        ("401 Unauthorized", format!("{}the token {TOKEN} is not known", "x".repeat(270))),
        ("500 Internal Server Error", "s1gnature-of-the-tests does not match".to_owned()),
        ("200 OK", whole),
        ("200 OK", step),
        ("200 OK", format!("{TOKEN} is no JSON")),
    ] {
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
        let serve = async {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let _length = stream.read(&mut request).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        };
        let options = options(&url).set("database_token", TOKEN);
        let error = tokio::select! {
            error = refused(&options, TOKEN) => error,
            () = serve => unreachable!(),
        };
        assert!(!format!("{error} {error:?}").contains("eyJhbGci"), "{error}");
    }
}
