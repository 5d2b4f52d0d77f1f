//! Questions: each in a read-only transaction of its own that sees one state, and asked again where it met what passes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::Row;

use super::connection::{ANSWER, Conn, Pool, Sql};
use super::error::{gave_way, is_canceled, is_of_recovery};
use crate::store::{StoreError, StoreErrorKind};

/// For a transaction with long answers: the server counts the time in which it gets rid of them for the statement's.
const MUCH: &str = "SELECT set_config('statement_timeout', '120000', true), set_config('lock_timeout', '0', true)";

/// How long the server may be quiet over what it has to think about for so long.
const MUCH_QUIET: Duration = Duration::from_secs(125);

/// How long it may be quiet where it ends a statement by itself when that takes too long: a little longer than [`STATEMENT_MS`](super::connection::STATEMENT_MS),
/// so that its word for that comes in time.
const WORD: Duration = Duration::from_secs(12);

/// For a transaction that goes through whole tables: other plans than by key, and ten minutes for each statement.
const THROUGH: &str = "SELECT set_config('statement_timeout', '600000', true), set_config('lock_timeout', '0', true), set_config('enable_seqscan', 'on', true), \
                       set_config('enable_hashjoin', 'on', true), set_config('enable_mergejoin', 'on', true)";

/// How long the server may be quiet then: a little longer than it may take.
const THROUGH_QUIET: Duration = Duration::from_secs(610);

/// Between two times that a question looks for the primary among several hosts.
const BETWEEN_HOSTS: Duration = Duration::from_millis(100);

/// How often a question is asked again that had to give way to what a standby follows: as long as [`ANSWER`] has not passed since it did first, and once at least.
const GIVES_WAY: u32 = 12;

/// Before it is asked again; each time as much longer.
const LET_PASS: Duration = Duration::from_millis(50);

impl Conn {
    /// One statement that goes through a whole table, inside a transaction.
    pub(super) async fn ask_through(&mut self, sql: Sql<'_>) -> Result<(), StoreError> {
        let statements = [Sql::plain(THROUGH), sql];
        self.send_within(THROUGH_QUIET, &statements).await.map(|_| ()).map_err(|failed| failed.error)
    }
}

/// How much time a question has.
#[derive(Clone, Copy)]
struct Time {
    set: Option<&'static str>,
    quiet: Duration,
    /// Whether it has two minutes where the server says that the usual time is too short. A network that is silent says nothing, and gets none of them.
    patient: bool,
}

impl Pool {
    /// Sends questions in one read-only transaction that sees one state; again once, if an idle connection turns out to be dead. While
    /// none of several hosts is the primary it waits for one to become it.
    pub(super) async fn read(&self, questions: Vec<Sql<'_>>) -> Result<Vec<Vec<Row>>, StoreError> {
        self.ask_all(Time { set: None, quiet: ANSWER, patient: false }, questions).await
    }

    /// The same for what may be long: its answer may be on the way for minutes.
    pub(super) async fn read_much(&self, questions: Vec<Sql<'_>>) -> Result<Vec<Vec<Row>>, StoreError> {
        self.ask_all(Time { set: Some(MUCH), quiet: ANSWER, patient: false }, questions).await
    }

    /// The same for what the server may have to think about, without a word meanwhile.
    pub(super) async fn read_patiently(&self, questions: Vec<Sql<'_>>) -> Result<Vec<Vec<Row>>, StoreError> {
        self.ask_all(Time { set: None, quiet: WORD, patient: true }, questions).await
    }

    /// The same for what goes through whole tables.
    pub(super) async fn read_through(&self, questions: Vec<Sql<'_>>) -> Result<Vec<Vec<Row>>, StoreError> {
        self.ask_all(Time { set: Some(THROUGH), quiet: THROUGH_QUIET, patient: false }, questions).await
    }

    async fn ask_all(&self, mut time: Time, questions: Vec<Sql<'_>>) -> Result<Vec<Vec<Row>>, StoreError> {
        let _turn = self.readers.acquire().await.map_err(|_| StoreError::closed())?;
        let count = questions.len();
        let mut statements = vec![Sql::plain("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")];
        statements.extend(time.set.map(Sql::plain));
        let mut first = statements.len();
        statements.extend(questions);
        statements.push(Sql::plain("COMMIT"));
        let waits = self.place.moves && self.found_primary.load(Ordering::Acquire);
        let mut tried = false;
        // How often it gave way, and since when: what was long on its way before is asked again as well.
        let mut ways_given = 0_u32;
        let mut first_way = None;
        let mut began = Instant::now();
        loop {
            let (error, made) = match self.get().await {
                Err(error) => (error, false),
                Ok(mut conn) => match conn.send_within(time.quiet, &statements).await {
                    Ok(answers) => {
                        self.put(conn);
                        return Ok(answers.into_iter().skip(first).take(count).collect());
                    }
                    Err(failed) => (failed.error, true),
                },
            };
            if made && time.patient && is_canceled(&error) {
                statements.insert(first, Sql::plain(MUCH));
                first += 1;
                time = Time { set: Some(MUCH), quiet: MUCH_QUIET, patient: false };
                began = Instant::now();
                continue;
            }
            if made && is_of_recovery(&error) {
                ways_given += 1;
                let since = *first_way.get_or_insert_with(Instant::now);
                if ways_given > GIVES_WAY || (ways_given > 1 && since.elapsed() >= ANSWER) {
                    return Err(gave_way(&self.place.name, ways_given, error));
                }
                tokio::time::sleep(LET_PASS * ways_given).await;
                continue;
            }
            let gone = error.kind() == StoreErrorKind::Unavailable;
            if gone {
                self.forget_idle();
            }
            let again = waits || (made && !tried);
            if !again || !gone || began.elapsed() >= ANSWER {
                return Err(error);
            }
            if tried || !made {
                tokio::time::sleep(BETWEEN_HOSTS).await;
            }
            tried = true;
        }
    }
}
