//! What a commit ends with where the server is busy, or others are faster.

use super::*;
use crate::model::{Clock, Entry, Mutation, NewRun, ProcessInfo, RunPart, SystemClock, time};
use crate::store::libsql::fake::{Fake, Say};
use crate::store::libsql::hrana::{Arg, BatchResult};

fn creation() -> Batch {
    let mutations = vec![Mutation::Create { run: NewRun::running(), at: time::from_micros(0).unwrap() }];
    let (run, none) = (RunId::new("run").unwrap(), Version::NONE);
    let part = RunPart { run, base: none, expect: none, guards: Vec::new(), mutations, after: None };
    Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }])
}

/// What a commit ends with on a server with nothing in it that says this to the writing of a batch, and to the giving up of its id.
async fn end(
    mut write: impl FnMut(&str) -> Option<Say> + Send + 'static,
    mut forswear: impl FnMut() -> Say + Send + 'static,
) -> StoreError {
    let server = Fake::start(move |sql| {
        if sql.starts_with("SELECT (SELECT version FROM seeknal_schema") {
            return Say::Row(&[2, 0, 0, 0]);
        }
        if sql.contains("RETURNING seq") && !sql.contains("RETURNING seq,") {
            return forswear();
        }
        write(sql).unwrap_or(Say::Row(&[]))
    });
    let process = ProcessInfo::current(SystemClock.now());
    let committer = Committer::new(Arc::new(server.client()), LeaseOwner { process, name: "".into() });
    let batch = creation();
    let error = committer.commit(&batch).await.unwrap_err();
    let doubtful = committer.memory().unsettled.holds(batch.id);
    assert_eq!(error.is_unknown_outcome(), doubtful, "{error}");
    error
}

fn on_writing(sql: &str, say: Say) -> Option<Say> {
    sql.starts_with("INSERT INTO batches").then_some(say)
}

#[tokio::test]
async fn a_server_that_is_busy_all_the_time_has_applied_nothing() {
    let answers: [fn() -> Say; 3] = [|| Say::Error("SQLITE_BUSY"), || Say::Error("TRANSACTION_TIMEOUT"), || Say::Status(429)];
    let ends = answers.map(|busy| {
        let never = tokio::spawn(end(move |sql| on_writing(sql, busy()), busy));
        // A copy that a network made is held back where the server can be told so.
        let forsworn = tokio::spawn(end(move |sql| on_writing(sql, busy()), || Say::Row(&[1])));
        (never, forsworn)
    });
    for (never, forsworn) in ends {
        let error = never.await.unwrap();
        assert_eq!(error.kind(), StoreErrorKind::Busy, "{error}");
        assert!(error.is_retryable() && !error.is_unknown_outcome() && !error.is_never_applied(), "{error}");
        let error = forsworn.await.unwrap();
        assert!(error.is_retryable() && error.is_never_applied(), "{error}");
    }
}

/// What the server's own disk and memory do is told as such: it is a libSQL server.
#[tokio::test]
async fn faults_of_the_servers_machine_are_told_as_such() {
    let faults = [
        ("SQLITE_FULL", StoreErrorKind::Full, "free some space"),
        ("SQLITE_IOERR", StoreErrorKind::Io, "disk"),
        ("SQLITE_IOERR_WRITE", StoreErrorKind::Io, "disk"),
        ("SQLITE_CANTOPEN", StoreErrorKind::Io, "disk"),
        ("SQLITE_NOMEM", StoreErrorKind::Busy, "no room"),
    ];
    for (code, kind, mend) in faults {
        let error = end(move |sql| on_writing(sql, Say::Error(code)), || Say::Status(500)).await;
        assert_eq!((error.kind(), error.is_unknown_outcome()), (kind, false), "{code}: {error}");
        let text = error.to_string();
        assert!(text.contains(mend) && !text.contains("is a libSQL server"), "{code}: {error}");
        // Where the transaction ends it may have been applied.
        let mut writes = false;
        let at_its_end = move |sql: &str| {
            writes = sql.starts_with("INSERT INTO batches") || writes && !sql.starts_with("BEGIN");
            (writes && sql == "COMMIT").then_some(Say::Error(code))
        };
        let error = end(at_its_end, || Say::Status(500)).await;
        assert!(error.is_unknown_outcome(), "{code}: {error}");
    }
}

#[tokio::test]
async fn a_batch_that_others_are_always_faster_than_is_given_up_for_good() {
    let changed = |sql: &str| sql.contains("THEN abs(-9223372036854775808)").then_some(Say::Error("SQLITE_ERROR"));
    let (forsworn, refused) = tokio::join!(end(changed, || Say::Row(&[1])), end(changed, || Say::Status(429)));
    assert_eq!(forsworn.kind(), StoreErrorKind::Busy, "{forsworn}");
    assert!(forsworn.is_retryable() && forsworn.is_never_applied(), "{forsworn}");
    assert!(refused.is_retryable(), "{refused}");
}

#[tokio::test]
async fn a_busy_server_says_nothing_of_a_sending_whose_answer_was_lost() {
    let lost_once = || {
        let mut sendings = 0;
        move |sql: &str| {
            sendings += u32::from(sql.starts_with("INSERT INTO batches"));
            on_writing(sql, if sendings == 1 { Say::Status(502) } else { Say::Error("SQLITE_BUSY") })
        }
    };
    let (unknown, forsworn) = tokio::join!(end(lost_once(), || Say::Error("SQLITE_BUSY")), end(lost_once(), || Say::Row(&[1])));
    assert!(unknown.is_unknown_outcome(), "{unknown}");
    assert!(forsworn.is_retryable() && forsworn.is_never_applied(), "{forsworn}");
}

/// What is removed of the answers to `told` batches when an opening closes so long after the last of them.
async fn removed_at_last(told: usize, later: Duration) -> Option<usize> {
    let server = Fake::start(|_| Say::Row(&[]));
    let process = ProcessInfo::current(SystemClock.now());
    let committer = Committer::new(Arc::new(server.client()), LeaseOwner { process, name: "".into() });
    (0..told).for_each(|_| committer.memory().told.note(creation().id));
    tokio::time::advance(later).await;
    let ids = match committer.last()?.args.into_iter().next() {
        Some(Arg::Text(ids)) => serde_json::from_str::<Vec<String>>(&ids).unwrap(),
        other => panic!("{other:?}"),
    };
    Some(ids.len())
}

#[tokio::test(start_paused = true)]
async fn a_closing_removes_what_no_copy_can_come_for_any_more() {
    let long = Duration::from_secs(121);
    assert_eq!(removed_at_last(0, long).await, None);
    assert_eq!(removed_at_last(511, Duration::from_secs(119)).await, None, "a copy may be on its way");
    assert_eq!(removed_at_last(511, long).await, Some(511));
    assert!(removed_at_last(80_000, long).await.unwrap() < 10_000, "who closes waits for it");
}

#[tokio::test(start_paused = true)]
async fn an_opening_looks_for_what_others_left_every_hour() {
    let mut told = told::Told::default();
    let mut looks = async |after: u64| {
        tokio::time::advance(Duration::from_secs(after)).await;
        let mut request = Request::default();
        told.sweep(&mut request).unwrap();
        told.swept(&request, &BatchResult::default());
        !request.statements.is_empty()
    };
    assert!(looks(0).await && !looks(60).await && !looks(3_500).await);
    assert!(looks(60).await && !looks(60).await);
}
