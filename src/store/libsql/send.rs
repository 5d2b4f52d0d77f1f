//! Sends batches and reads what became of them: questions, which may be asked again, and changes, which are told apart by the step that failed.

use std::time::{Duration, Instant};

use super::client::{Client, USUAL};
use super::fault::{Class, Fault};
use super::garbled;
use super::hrana::{Batch, BatchResult, Stmt};
use super::rows::Table;

/// How long a busy server is asked again.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// How often a question is asked whose answer was lost.
const ASKED: u32 = 3;

/// Which state a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// One that has all that this client was told of; a replica may answer.
    Latest,
    /// The primary's, after everything that was committed before: what a decision may be built on.
    Primary,
}

/// A pause before the next attempt: longer every time, and never the same for two who collided. Who asks may have no runtime, or no timers: it is one of the
/// client's.
pub(super) async fn pause(client: &Client, attempt: u32) {
    let most = 5_u64 << attempt.min(5);
    // The low bits of the name are random.
    let [.., dice] = uuid::Uuid::now_v7().into_bytes();
    let share = most.saturating_mul(u64::from(dice)) / 256;
    let pause = Duration::from_millis(1 + most / 2 + share);
    let _closed_meanwhile = client.beside(async move { tokio::time::sleep(pause).await }).await.is_none();
}

/// Where a batch failed, and why.
#[derive(Debug)]
pub(super) struct Failed {
    /// The index of the statement; `None`: the batch as a whole, its beginning or its end.
    pub(super) statement: Option<usize>,
    /// Whether the server says that a row with this key is there already.
    pub(super) is_duplicate: bool,
    pub(super) fault: Fault,
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Self {
        Self { statement: None, is_duplicate: false, fault }
    }
}

/// Sends once.
pub(super) async fn once(client: &Client, batch: &Batch<'_>) -> Result<BatchResult, Failed> {
    once_within(client, batch, USUAL).await
}

async fn once_within(client: &Client, batch: &Batch<'_>, within: Duration) -> Result<BatchResult, Failed> {
    let result = client.send(batch, within).await?;
    let commit = batch.commit_step();
    if result.is_ok(commit) {
        return Ok(result);
    }
    let Some((step, error)) = result.first_error() else {
        return Err(Fault::new(Class::Lost, "its answer says neither that the transaction was committed nor why not").into());
    };
    let fault = Fault::of_statement(error);
    if step == commit {
        // The server may have written it and failed behind it.
        return Err(
            Fault::new(Class::AtCommit, format_args!("committing failed: {}", super::fault::short(&error.message))).into()
        );
    }
    let is_duplicate = error.code().starts_with("SQLITE_CONSTRAINT") || error.message.contains("UNIQUE constraint");
    Err(Failed { statement: step.checked_sub(1), is_duplicate, fault })
}

/// Asks in one read transaction, again where the answer was lost or the server is busy.
pub(super) async fn ask(client: &Client, which: Ask, questions: &[Stmt]) -> Result<Vec<Table>, Fault> {
    ask_within(client, which, questions, USUAL).await
}

/// As [`ask`], with so much time for the server to find the answer.
pub(super) async fn ask_within(client: &Client, which: Ask, questions: &[Stmt], within: Duration) -> Result<Vec<Table>, Fault> {
    match ask_as_is(client, which, questions, within).await {
        Err(fault) if fault.class == Class::Garbled => Box::pin(garbled::ask(client, which, questions, within)).await,
        answer => answer,
    }
}

/// As [`ask_within`], where no answer has text that is not UTF-8.
pub(super) async fn ask_as_is(client: &Client, which: Ask, questions: &[Stmt], within: Duration) -> Result<Vec<Table>, Fault> {
    let batch = Batch {
        exclusive: which == Ask::Primary,
        writes: false,
        statements: questions,
        replication_index: client.replication().filter(|_| which == Ask::Latest),
    };
    let began = Instant::now();
    let mut attempt = 0_u32;
    loop {
        let failed = match once_within(client, &batch, within).await {
            Ok(mut result) => {
                let tables = questions.iter().enumerate();
                return Ok(tables.map(|(index, stmt)| Table::new(result.take(Batch::step_of(index)), stmt.place)).collect());
            }
            Err(failed) => failed,
        };
        attempt = attempt.saturating_add(1);
        let again = match failed.fault.class {
            Class::Busy => began.elapsed() < PATIENCE,
            Class::Lost | Class::AtCommit => attempt < ASKED && began.elapsed() < PATIENCE,
            _ => false,
        };
        if !again {
            return Err(failed.fault.of_question());
        }
        pause(client, attempt).await;
    }
}

/// Writes in one transaction, again where the server was busy.
pub(super) async fn write(client: &Client, statements: &[Stmt]) -> Result<(), Fault> {
    let batch = Batch { exclusive: true, writes: true, statements, replication_index: None };
    let began = Instant::now();
    let mut attempt = 0_u32;
    loop {
        match once(client, &batch).await {
            Ok(_) => return Ok(()),
            Err(failed) if failed.fault.class == Class::Busy && began.elapsed() < PATIENCE => {}
            Err(failed) => return Err(failed.fault),
        }
        attempt = attempt.saturating_add(1);
        pause(client, attempt).await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::{Context, Poll, Wake, Waker};
    use std::thread::Thread;

    use super::*;
    use crate::store::libsql::fake::{Fake, Say};

    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    #[test]
    fn a_question_is_asked_again_where_there_is_no_runtime() {
        let asked = Arc::new(AtomicU32::new(0));
        let times = Arc::clone(&asked);
        let server = Fake::start(move |sql| {
            if !sql.contains("meta") {
                return Say::Row(&[]);
            }
            if times.fetch_add(1, Ordering::SeqCst) == 0 { Say::Error("SQLITE_BUSY") } else { Say::Row(&[7]) }
        });
        let client = server.client();
        let questions = [Stmt::ask("meta", "SELECT seq FROM meta", Vec::new())];
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut asking = pin!(ask(&client, Ask::Latest, &questions));
        let answered = loop {
            if let Poll::Ready(answered) = asking.as_mut().poll(&mut Context::from_waker(&waker)) {
                break answered;
            }
            std::thread::park();
        };
        assert_eq!(answered.map(|tables| tables.len()).ok(), Some(1));
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }
}
