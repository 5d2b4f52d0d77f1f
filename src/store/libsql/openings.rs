//! Who has the state open. Each opening has a row, and says again and again that it lives; how long ago it did so is counted by the server's clock.
//!
//! Nothing proves here that a process is dead: there is no connection whose end the server would see. One that was not heard of for a minute is taken for
//! gone, as a lease is that nobody renewed.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::client::Client;
use super::fault::Class;
use super::hrana::Stmt;
use super::lease::now_ms;
use super::read::nth;
use super::rows::stamp_text;
use super::send::{self, Ask};
use crate::model::ProcessInfo;
use crate::store::{OpenProcess, StoreError, StoreErrorKind};

/// Between two words of an opening.
const EVERY: Duration = Duration::from_secs(10);

/// After a word that was refused: the server may allow writing again before this opening is taken for gone.
const REFUSED: Duration = Duration::from_secs(20);

/// Who was heard of this lately lives, milliseconds: two words may be lost.
const LIVES_MS: u64 = 35_000;

/// Who was not heard of for so long is gone, milliseconds.
const GONE_MS: u64 = 60_000;

/// How often the first word is tried whose answer is lost: a second time it changes nothing.
const TRIES: u32 = 3;

/// The opening's row, as of now.
fn word(process: &ProcessInfo) -> Stmt {
    Stmt::exec(
        concat!(
            "INSERT INTO openings (process, host, pid, started_at, seen_ms) VALUES (?1, ?2, ?3, ?4, ",
            now_ms!(),
            ") ON CONFLICT (process) DO UPDATE SET seen_ms = excluded.seen_ms"
        ),
        vec![
            (&*process.id).into(),
            (&*process.host).into(),
            u64::from(process.pid).into(),
            stamp_text(process.started_at).into(),
        ],
    )
}

/// Writes the opening's row, and removes those of openings that were gone a day ago. `false`: a token that only reads cannot; who comes with it changes
/// nothing, and need not be known.
pub(super) async fn register(client: &Client, process: &ProcessInfo) -> Result<bool, StoreError> {
    let statements =
        [Stmt::exec(concat!("DELETE FROM openings WHERE seen_ms < ", now_ms!(), " - 86400000"), Vec::new()), word(process)];
    let mut tried = 0;
    loop {
        tried += 1;
        let Err(fault) = send::write(client, &statements).await else { return Ok(true) };
        if tried < TRIES && matches!(fault.class, Class::Lost | Class::AtCommit) {
            send::pause(client, tried).await;
            continue;
        }
        // Whether the row is there or not: nothing of the state was changed.
        let error = fault.of_question().into_error(client.place());
        return if error.kind() == StoreErrorKind::ReadOnly { Ok(false) } else { Err(error) };
    }
}

/// Says that the opening lives, until the client is gone. A word that is refused is not the last: whoever was registered may have runs and locks, and would
/// lose them by falling silent.
pub(super) async fn keep(client: Weak<Client>, process: ProcessInfo) {
    let mut pause = EVERY;
    loop {
        tokio::time::sleep(pause).await;
        let Some(client) = client.upgrade() else { return };
        let said = send::write(&client, &[word(&process)]).await;
        pause = if said.is_err_and(|fault| fault.class == Class::ReadOnly) { REFUSED } else { EVERY };
    }
}

/// Takes the opening's row away.
pub(super) async fn leave(client: &Arc<Client>, process: &ProcessInfo) {
    let row = Stmt::exec("DELETE FROM openings WHERE process = ?1", vec![(&*process.id).into()]);
    // Who cannot say so is taken for gone after a while.
    let _unsaid = send::write(client, &[row]).await.is_err();
}

/// All openings that are known; `None`: the tables are of a version that did not note them.
pub(super) async fn list(client: &Client) -> Result<Option<Vec<OpenProcess>>, StoreError> {
    let question = Stmt::ask(
        "openings",
        concat!(
            "SELECT process, host, pid, started_at, max(0, ",
            now_ms!(),
            " - seen_ms) FROM openings ORDER BY started_at, process"
        ),
        Vec::new(),
    );
    let tables = match send::ask(client, Ask::Latest, &[question]).await {
        // A reader of what an older version wrote.
        Err(fault) if fault.class == Class::Refused && fault.message().contains("no such table") => return Ok(None),
        answer => answer.map_err(|fault| fault.into_error(client.place()))?,
    };
    let mut found = Vec::new();
    for row in nth(client, &tables, 0)?.rows() {
        let mut process = ProcessInfo::current(row.stamp(3)?);
        process.id = row.text(0)?.into();
        process.host = row.text(1)?.into();
        process.pid = row.small(2)?;
        let alive = match row.number(4)? {
            ..LIVES_MS => Some(true),
            LIVES_MS..GONE_MS => None,
            GONE_MS.. => Some(false),
        };
        found.push(OpenProcess::new(process, alive));
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Clock, SystemClock};
    use crate::store::libsql::fake::{Fake, Say};

    #[tokio::test(start_paused = true)]
    async fn an_opening_that_is_refused_once_says_again_that_it_lives() {
        let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let mut words = 0;
        let server = Fake::start(move |sql| {
            if sql.starts_with("BEGIN") {
                words += 1;
                said.send(words).unwrap();
            }
            match (words, sql) {
                (1, _) => Say::Status(403),
                (2, "COMMIT") => Say::Error("BLOCKED"),
                _ => Say::Row(&[]),
            }
        });
        let client = Arc::new(server.client());
        let began = tokio::time::Instant::now();
        let until_the_third = async { while heard.recv().await.unwrap() < 3 {} };
        tokio::select! {
            () = keep(Arc::downgrade(&client), ProcessInfo::current(SystemClock.now())) => unreachable!("it fell silent"),
            () = until_the_third => {}
        }
        assert!(began.elapsed() < Duration::from_millis(GONE_MS), "it was taken for gone meanwhile");
    }
}
