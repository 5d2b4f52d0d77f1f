//! Who has the state open. Each opening has a row, and says again and again that it lives; how long ago it did so is counted by the server's clock.
//!
//! Nothing proves here that a process is dead: there is no connection whose end the server would see. One that was not heard of for a minute is taken for
//! gone, as a lease is that nobody renewed. But while the server is away nobody can say a word: silence counts only where the server answered meanwhile, which
//! who judges has to see for himself. The same holds for rows that are removed, and for words that lie in the future: the clock went back since.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::client::Client;
use super::fault::Class;
use super::hrana::Stmt;
use super::lease::{self, now_ms};
use super::read::nth;
use super::rows::stamp_text;
use super::send::{self, Ask};
use crate::model::ProcessInfo;
use crate::store::boot_time::boot_time;
use crate::store::{OpenProcess, StoreError, StoreErrorKind};

/// Between two words of an opening.
const EVERY: Duration = Duration::from_secs(10);

/// After a word that was refused: the server may allow writing again before this opening is taken for gone.
const REFUSED: Duration = Duration::from_secs(20);

/// Who was heard of this lately lives, milliseconds: two words may be lost.
const LIVES_MS: u64 = 35_000;

/// Who was not heard of for so long is gone, milliseconds.
const GONE_MS: u64 = 60_000;

/// Who was not heard of for so long is forgotten, once it is seen that it is gone, milliseconds.
const FORGOTTEN_MS: u64 = 86_400_000;

/// Between two looks for who is to be forgotten. The first one comes with the first word behind the beginning, when short openings have ended.
const TIDY_EVERY: Duration = Duration::from_secs(3600);

/// After a word that failed in another way: when the server is back everybody is to be heard of soon.
const FAILED: Duration = Duration::from_secs(1);

/// Who is silent while the server answers for so long is gone: longer than it takes from one word to the next, the longest wait for an answer, a failed
/// connection and a pause included.
const WATCHED: Duration = Duration::from_secs(16);

/// Between two looks at who is silent. Answers that are further than twice this apart prove nothing of the time between them.
const LOOK: Duration = Duration::from_secs(1);

/// How long somebody watches a server that comes and goes.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// Removes rows that nobody may have the time to watch, where all openings are short: somebody else was heard of a day after their last word, and that is a day
/// ago too. That a server was away for as long removes nobody: all who lived then were heard of in the same moments.
const FORGET: &str = concat!(
    "DELETE FROM openings WHERE seen_ms < (SELECT max(seen_ms) FROM openings WHERE seen_ms < ",
    now_ms!(),
    " - 86400000) - 86400000"
);

/// Writes the opening's row. `false`: a token that only reads cannot; who comes with it changes nothing, and need not be known.
pub(super) async fn register(client: &Client, process: &ProcessInfo) -> Result<bool, StoreError> {
    let statements = [Stmt::exec(FORGET, Vec::new()), lease::shorten(None), word(process)];
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

/// What says again and again that an opening lives.
#[derive(Debug)]
pub(super) struct Keeper(Mutex<Option<(oneshot::Sender<()>, JoinHandle<()>)>>);

impl Keeper {
    pub(super) fn start(client: &Arc<Client>, process: &ProcessInfo) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (client_of_words, process) = (Arc::downgrade(client), process.clone());
        let client_of_looks = Weak::clone(&client_of_words);
        let work = client.spawn(async move {
            tokio::select! {
                () = keep(client_of_words, process, stopped) => {}
                () = tidy(client_of_looks) => {}
            }
        });
        Self(Mutex::new(Some((stop, work))))
    }

    /// Ends it; a word that is on its way is waited for: behind what takes the opening's row away it would put it there again.
    pub(super) async fn end(&self) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((stop, work)) = kept else { return };
        drop(stop);
        let _ended_anyhow = work.await.is_err();
    }
}

/// Says that the opening lives, until it is told to stop or the client is gone. A word that is refused is not the last: whoever was registered may have runs and locks, and would
/// lose them by falling silent.
async fn keep(client: Weak<Client>, process: ProcessInfo, mut stopped: oneshot::Receiver<()>) {
    let mut pause = EVERY;
    loop {
        tokio::select! {
            _ = &mut stopped => return,
            () = tokio::time::sleep(pause) => {}
        }
        let Some(client) = client.upgrade() else { return };
        let said = send::write(&client, &[lease::shorten(Some(&process)), word(&process)]).await;
        pause = match said {
            Ok(()) => EVERY,
            Err(fault) if fault.class == Class::ReadOnly => REFUSED,
            Err(_) => FAILED,
        };
    }
}

/// Forgets openings that are gone for long, until the client is gone. Only room depends on it.
async fn tidy(client: Weak<Client>) {
    let mut pause = EVERY;
    loop {
        tokio::time::sleep(pause).await;
        pause = TIDY_EVERY;
        let Some(client) = client.upgrade() else { return };
        let _the_next_time = forget(&client).await.is_err();
    }
}

/// Removes the rows of openings that were not heard of for a day, once this one has seen that they are gone.
async fn forget(client: &Client) -> Result<(), StoreError> {
    let Some(found) = list(client).await? else { return Ok(()) };
    let old = found.iter().filter(|heard| heard.silent_ms >= FORGOTTEN_MS);
    let who: BTreeSet<String> = old.map(|heard| heard.process.id.to_string()).collect();
    let mut statements = vec![lease::shorten(None)];
    if !who.is_empty() {
        let gone = Gone::default();
        let watched = watch(client, &gone, &who).await?.unwrap_or_default();
        let watched = watched.iter().filter(|heard| gone.holds(heard)).map(|heard| (&*heard.process.id, heard.seen_ms));
        let rows = watched.map(|(process, seen_ms)| serde_json::json!([process, seen_ms])).collect::<serde_json::Value>();
        // A word that came meanwhile keeps its row.
        let removal = "DELETE FROM openings WHERE (process, max(0, seen_ms)) IN (SELECT value->>0, value->>1 FROM json_each(?1))";
        statements.push(Stmt::exec(removal, vec![rows.to_string().into()]));
    }
    send::write(client, &statements).await.map_err(|fault| fault.into_error(client.place()))
}

/// Takes the opening's row away, and what else there is to remove with it.
pub(super) async fn leave(client: &Arc<Client>, process: &ProcessInfo, beside: Option<Stmt>) {
    let mut statements = vec![Stmt::exec("DELETE FROM openings WHERE process = ?1", vec![(&*process.id).into()])];
    statements.extend(beside);
    // Who cannot say so is taken for gone after a while.
    let _unsaid = send::write(client, &statements).await.is_err();
}

/// An opening, and when it was heard of last.
#[derive(Debug)]
pub(super) struct Heard {
    process: ProcessInfo,
    seen_ms: u64,
    /// How far that is from now, also where it lies in the future.
    silent_ms: u64,
}

/// The openings of which it was seen that they are gone, each with when it was heard of last: a word since then says otherwise.
#[derive(Debug, Default)]
pub(super) struct Gone(Mutex<HashMap<String, u64>>);

impl Gone {
    fn note(&self, heard: &Heard) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(heard.process.id.to_string(), heard.seen_ms);
    }

    fn holds(&self, heard: &Heard) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&*heard.process.id) == Some(&heard.seen_ms)
    }

    /// What is known of all openings.
    pub(super) fn judge(&self, found: Vec<Heard>) -> Vec<OpenProcess> {
        let of = |heard: Heard| {
            let alive = match heard.silent_ms {
                ..LIVES_MS => Some(true),
                GONE_MS.. if self.holds(&heard) => Some(false),
                LIVES_MS.. => None,
            };
            OpenProcess::new(heard.process, alive)
        };
        let listed: BTreeSet<String> = found.iter().map(|heard| heard.process.id.to_string()).collect();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|process, _| listed.contains(process));
        found.into_iter().map(of).collect()
    }
}

/// Takes the time to see whether some of the openings are gone, if they have been silent for long.
pub(super) async fn watch(client: &Client, gone: &Gone, who: &BTreeSet<String>) -> Result<Option<Vec<Heard>>, StoreError> {
    let began = boot_time();
    let (mut since, mut last) = (began, began);
    let mut silent: Option<HashMap<String, u64>> = None;
    loop {
        let asked = boot_time();
        let Some(found) = list(client).await? else { return Ok(None) };
        let doubted: Vec<&Heard> = found
            .iter()
            .filter(|heard| heard.silent_ms >= GONE_MS && who.contains(&*heard.process.id) && !gone.holds(heard))
            // Who spoke meanwhile lives, and is not waited for again, whatever the server's clock does.
            .filter(|heard| silent.as_ref().is_none_or(|silent| silent.get(&*heard.process.id) == Some(&heard.seen_ms)))
            .collect();
        let now = boot_time();
        if now.saturating_sub(last) > LOOK * 2 || silent.is_none() {
            since = now;
        }
        last = now;
        // The question itself was asked so long after the first answer.
        if asked.saturating_sub(since) >= WATCHED {
            for heard in doubted {
                gone.note(heard);
            }
            return Ok(Some(found));
        }
        if doubted.is_empty() || now.saturating_sub(began) >= PATIENCE {
            return Ok(Some(found));
        }
        silent = Some(doubted.into_iter().map(|heard| (heard.process.id.to_string(), heard.seen_ms)).collect());
        // Who asks may have no timers: the client's.
        if client.beside(tokio::time::sleep(LOOK)).await.is_none() {
            return Err(StoreError::closed());
        }
    }
}

/// All openings that are known; `None`: the tables are of a version that did not note them.
pub(super) async fn list(client: &Client) -> Result<Option<Vec<Heard>>, StoreError> {
    let question = Stmt::ask(
        "openings",
        concat!(
            "SELECT process, host, pid, started_at, max(0, seen_ms), abs(",
            now_ms!(),
            " - max(0, seen_ms)) FROM openings ORDER BY started_at, process"
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
        found.push(Heard { process, seen_ms: row.number(4)?, silent_ms: row.number(5)? });
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
        let (_stop, until) = oneshot::channel();
        let until_the_third = async { while heard.recv().await.unwrap() < 3 {} };
        tokio::select! {
            () = keep(Arc::downgrade(&client), ProcessInfo::current(SystemClock.now()), until) => unreachable!("it fell silent"),
            () = until_the_third => {}
        }
        assert!(began.elapsed() < Duration::from_millis(GONE_MS), "it was taken for gone meanwhile");
    }

    #[tokio::test(start_paused = true)]
    async fn an_opening_that_ends_waits_for_its_word() {
        let (said, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let (answer, answered) = std::sync::mpsc::channel::<()>();
        let server = Fake::start(move |sql| {
            if sql.starts_with("INSERT INTO openings") {
                said.send(()).unwrap();
                let _test_has_ended = answered.recv().is_err();
            }
            Say::Row(&[])
        });
        let client = Arc::new(server.client());
        let (stop, stopped) = oneshot::channel();
        let work = tokio::spawn(keep(Arc::downgrade(&client), ProcessInfo::current(SystemClock.now()), stopped));
        heard.recv().await.unwrap();
        let keeper = Keeper(Mutex::new(Some((stop, work))));
        let mut ending = std::pin::pin!(keeper.end());
        let at_once = std::future::poll_fn(|context| std::task::Poll::Ready(ending.as_mut().poll(context))).await;
        assert!(at_once.is_pending(), "its word is still on its way");
        answer.send(()).unwrap();
        ending.await;
    }
}
