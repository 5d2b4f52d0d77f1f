//! Tokens that are right, wrong, read-only and expired, each with encryption and without: one clear error, nothing changed, no secret told.

use std::path::Path;

use seeknal_state::{BackendOptions, Coordinator, Error, NewRun, NodeUpdate, RunId, RunQuery, StoreErrorKind};

use super::opening::{assert_hidden, backend, options, refused};
use super::proxy::Tls;
use super::sqld::{Sqld, certificates};

/// A server that wants tokens, with encryption before it if that is asked for.
struct Guarded {
    server: Sqld,
    front: Option<Tls>,
    folder: tempfile::TempDir,
}

impl Guarded {
    async fn new(encrypted: bool) -> Option<Self> {
        let server = Sqld::with_tokens()?;
        let folder = tempfile::tempdir().unwrap();
        let mut front = None;
        if encrypted {
            certificates(folder.path(), "DNS:localhost");
            front = Some(Tls::before(server.port(), folder.path()).await);
        }
        Some(Self { server, front, folder })
    }

    fn with(&self, token: &str) -> BackendOptions {
        match &self.front {
            None => options(&format!("http://127.0.0.1:{}?authToken={token}", self.server.port())),
            Some(front) => {
                options(&format!("libsql://{token}@localhost:{}", front.port)).set("database_ca_file", ca(self.folder.path()))
            }
        }
    }
}

fn ca(folder: &Path) -> String {
    folder.join("ca.pem").to_string_lossy().into_owned()
}

async fn tried(encrypted: bool) {
    let Some(guarded) = Guarded::new(encrypted).await else { return };
    let rw = guarded.server.token(r#"{"a":"rw"}"#);
    let ro = guarded.server.token(r#"{"a":"ro"}"#);
    let wrong = [
        ("signed by somebody else", Sqld::forged(r#"{"a":"rw"}"#)),
        ("expired", guarded.server.token(r#"{"a":"rw","exp":1500000000}"#)),
        ("no token at all", "neither-a-token-nor-a-secret".to_owned()),
    ];

    // Before there is anything: nobody but who may write makes it.
    for (name, token) in &wrong {
        let error = refused(&guarded.with(token), token).await;
        assert_eq!(error.kind(), StoreErrorKind::Input, "{name}: {error}");
    }
    assert_eq!(refused(&guarded.with(&ro), &ro).await.kind(), StoreErrorKind::ReadOnly);
    let looked = refused(&guarded.with(&rw).read_only(true), &rw).await;
    assert_eq!(looked.kind(), StoreErrorKind::NotFound, "something was made: {looked}");

    // The right one.
    let state = Coordinator::open(backend(&guarded.with(&rw))).await.unwrap();
    state.create_run("run", NewRun::running()).await.unwrap();
    let before = state.get_run("run").await.unwrap().unwrap().state().clone();
    assert_hidden(&rw, &[format!("{state:?}"), format!("{:?}", state.backend()), state.backend().location()]);

    for (name, token) in &wrong {
        for options in [guarded.with(token), guarded.with(token).read_only(true)] {
            let error = refused(&options, token).await;
            assert_eq!(error.kind(), StoreErrorKind::Input, "{name}: {error}");
            let text = error.to_string();
            assert!(
                text.contains("token") && text.contains("SEEKNAL_DATABASE_TOKEN") && text.lines().count() == 1,
                "{name}: {text}"
            );
        }
    }
    let reading = Coordinator::open(backend(&guarded.with(&ro))).await.unwrap();
    assert_eq!(reading.get_run("run").await.unwrap().unwrap().state(), &before, "it reads");
    let error = reading.set_node_state("run", "n", NodeUpdate::success()).await.unwrap_err();
    let Error::Store(told) = &error else { panic!("{error}") };
    assert_eq!((told.kind(), told.is_unknown_outcome()), (StoreErrorKind::ReadOnly, false), "{error}");
    assert_hidden(&ro, &[error.to_string(), format!("{error:?}")]);
    reading.close().await.unwrap();

    let run = RunId::new("run").unwrap();
    assert_eq!(state.backend().load_run(&run).await.unwrap().unwrap(), before, "nothing was changed");
    assert_eq!(state.backend().list_runs(&RunQuery::default()).await.unwrap().runs.len(), 1);
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_without_encryption() {
    tried(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_through_encryption() {
    tried(true).await;
}
