//! Connections: what is set on each, how statements go down many at a time, and a store of idle ones. How a server is reached stands in `reach`, how questions
//! are asked in `ask`.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, Connection, Error, Notification, Row, SimpleQueryMessage, Socket, Statement};

use super::error::{is_refused, sql_error};
use super::heads::KnownHeads;
use super::moved::Moved;
use super::place::Place;
use super::schema;
pub(super) use super::sql::{Param, Sql};
use super::sql::{on_the_way, weight};
use super::tls::{MakeTls, TlsStream};
use crate::store::decide::OwnRuns;
use crate::store::{StoreError, StoreErrorKind};

/// How long a statement may take on the server, milliseconds. A commit as a whole has as long.
pub(super) const STATEMENT_MS: u64 = 10_000;

/// How long one of its locks may let it wait, milliseconds: the server's word that it did so in vain is certain, and comes before the commit as a whole is
/// given up.
const LOCK_MS: u64 = 8_000;

/// How long a connection on which an answer is waited for may be quiet. The server's own limits end statements, not silence on the way.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// How long the server waits for a client inside a transaction, milliseconds: a process that is stopped there holds up all others that write to its
/// runs, and loses its transaction after this.
pub(super) const IDLE_IN_TRANSACTION_MS: u64 = 3_000;

/// Settings that not every server has, and what they are set to.
///
/// The plans that are forced look as if they cost very much, and the server would compile them. A machine that loses its power says no good-bye: without
/// questions of its own the server would take its locks and transactions for held for hours.
const WHERE_KNOWN: [(&str, &str); 6] = [
    ("jit", "off"),
    // Each statement has a limit of its own.
    ("transaction_timeout", "0"),
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "15000"),
];

/// Questions that are asked at once; batches have connections beside these.
const READERS: usize = 8;

/// What became of statements that were sent together.
pub(super) struct Failed {
    /// Which of them it was.
    pub(super) index: usize,
    pub(super) error: StoreError,
    /// Whether the server itself refused it, in a session that goes on: then nothing of its transaction can be committed any more. Who stands between (a
    /// pooler) ends sessions with words of its own, which say nothing of what the server does with what it was sent.
    pub(super) by_server: bool,
}

/// One connection, with the statements that it has prepared.
pub(super) struct Conn {
    client: Client,
    statements: HashMap<&'static str, Statement>,
    place: Arc<Place>,
    /// Ends the other half: of a connection that is silent nothing is waited for.
    driver: Option<AbortHandle>,
    moved: Arc<Moved>,
}

fn set_where_known((name, value): (&str, &str)) -> String {
    format!("SELECT set_config('{name}', '{value}', false) WHERE current_setting('{name}', true) IS NOT NULL; ")
}

/// A connection's other half: whoever made it drives it.
pub(super) type Driver = Connection<Socket, TlsStream>;

impl Conn {
    /// A connection that was just made.
    pub(super) fn over(client: Client, place: &Arc<Place>) -> Self {
        Self { client, statements: HashMap::new(), place: Arc::clone(place), driver: None, moved: Arc::new(Moved::new()) }
    }

    /// What comes in time, or an error and the end of the connection.
    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, StoreError> {
        self.within(ANSWER, work).await
    }

    async fn within<T>(&self, limit: Duration, work: impl Future<Output = T>) -> Result<T, StoreError> {
        self.moved.wait(limit, work).await.ok_or_else(|| {
            if let Some(driver) = &self.driver {
                driver.abort();
            }
            StoreError::not_applied(
                StoreErrorKind::Unavailable,
                format!("{}: no answer within {} s; check the server and the network", self.place.name, limit.as_secs()),
            )
        })
    }

    /// Sets what every connection has; one for work in the `background` waits for no disk.
    async fn set_up(&self, place: &Place, background: bool) -> Result<(), StoreError> {
        let fail = |error| sql_error(&place.name, error);
        // Names of statements hold for the connection; so do plans, which must not be made for a table that is still empty.
        let mut settings = format!(
            "SET search_path = \"{}\"; SET TimeZone = 'UTC'; SET client_min_messages = warning; \
             SET statement_timeout = {STATEMENT_MS}; SET lock_timeout = {LOCK_MS}; \
             SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}; \
             SET default_transaction_isolation = 'read committed'; \
             SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; ",
            place.schema
        );
        settings.push_str(&WHERE_KNOWN.map(set_where_known).concat());
        settings.push_str(if background {
            "SET synchronous_commit = off; "
        } else {
            // Stronger than on: what an operator asked for stays.
            "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' \
             ELSE 'on' END, false); "
        });
        if place.read_only {
            settings.push_str("SET default_transaction_read_only = on; ");
        }
        self.in_time(self.client.batch_execute(&settings)).await?.map_err(fail)?;
        let wanted: &[&str] = if background { &["off"] } else { &["on", "remote_apply"] };
        let found = self.show("synchronous_commit").await?;
        if !wanted.contains(&found.as_str()) {
            return Err(StoreError::not_applied(
                StoreErrorKind::Unsupported,
                format!(
                    "{}: synchronous_commit stays {found:?}; without it a commit may be lost, so nothing is written",
                    place.name
                ),
            ));
        }
        Ok(())
    }

    /// A setting of the server.
    pub(super) async fn show(&self, name: &str) -> Result<String, StoreError> {
        let answer = self.in_time(self.client.simple_query(&format!("SHOW {name}"))).await?;
        let answer = answer.map_err(|error| sql_error(&self.place.name, error))?;
        let found = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        Ok(found.unwrap_or_default())
    }

    /// Several statements without values, in one go.
    pub(super) async fn batch(&self, sql: &str) -> Result<(), StoreError> {
        self.in_time(self.client.batch_execute(sql)).await?.map_err(|error| sql_error(&self.place.name, error))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Prepares what was not prepared on this connection before; nothing runs.
    pub(super) async fn prepare(&mut self, statements: &[Sql<'_>]) -> Result<(), Failed> {
        let mut new: Vec<(usize, &Sql<'_>)> = Vec::new();
        for (index, sql) in statements.iter().enumerate() {
            if !self.statements.contains_key(sql.text) && !new.iter().any(|(_, other)| other.text == sql.text) {
                new.push((index, sql));
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let client = &self.client;
        let sent = new.iter().map(|(_, sql)| -> Sent<'_, _> { Box::pin(client.prepare(sql.text)) }).collect();
        let late = |error| Failed { index: 0, by_server: false, error };
        for ((index, sql), prepared) in new.into_iter().zip(self.in_time(in_order(sent)).await.map_err(late)?) {
            let fail = |error: Error| Failed { index, by_server: is_refused(&error), error: sql_error(sql.place, error) };
            self.statements.insert(sql.text, prepared.map_err(fail)?);
        }
        Ok(())
    }

    /// Sends statements together and waits for all of them: one way there and back, however many they are. They run in order; after the first
    /// that fails inside a transaction none of the others does anything.
    pub(super) async fn send(&mut self, statements: &[Sql<'_>]) -> Result<Vec<Vec<Row>>, Failed> {
        self.send_within(ANSWER, statements).await
    }

    /// The same, on a connection that may be quiet for so long.
    pub(super) async fn send_within(&mut self, quiet: Duration, statements: &[Sql<'_>]) -> Result<Vec<Vec<Row>>, Failed> {
        self.prepare(statements).await?;
        let client = &self.client;
        let known = &self.statements;
        let mut sent: Vec<Sent<'_, Result<Vec<Row>, Error>>> = Vec::new();
        for sql in statements {
            let Some(statement) = known.get(sql.text) else { continue };
            sent.push(Box::pin(async move {
                let params: Vec<&(dyn ToSql + Sync)> = sql.params.iter().map(|param| &**param as &(dyn ToSql + Sync)).collect();
                client.query(statement, &params).await
            }));
        }
        let mut answers = Vec::with_capacity(statements.len());
        let late = |error| Failed { index: statements.len(), by_server: false, error };
        let limit = quiet + on_the_way(weight(statements));
        for (index, answer) in self.within(limit, in_order(sent)).await.map_err(late)?.into_iter().enumerate() {
            match answer {
                Ok(rows) => answers.push(rows),
                Err(error) => {
                    let by_server = is_refused(&error) && !client.is_closed();
                    let place = statements.get(index).map_or("a statement", |sql| sql.place);
                    return Err(Failed { index, by_server, error: sql_error(place, error) });
                }
            }
        }
        Ok(answers)
    }

    /// One statement, outside of a transaction or inside one.
    pub(super) async fn ask(&mut self, sql: Sql<'_>) -> Result<Vec<Row>, StoreError> {
        let mut answers = self.send(&[sql]).await.map_err(|failed| failed.error)?;
        Ok(answers.pop().unwrap_or_default())
    }
}

/// A statement on its way.
type Sent<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Polls all of them, first to last: what the first poll of each sends is on its way before anybody waits.
async fn in_order<T>(mut futures: Vec<Sent<'_, T>>) -> Vec<T> {
    let mut done: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|cx| {
        let mut all = true;
        for (future, slot) in futures.iter_mut().zip(&mut done) {
            if slot.is_none() {
                match future.as_mut().poll(cx) {
                    Poll::Ready(value) => *slot = Some(value),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}

/// The connections of one opening.
pub(super) struct Pool {
    pub(super) place: Arc<Place>,
    pub(super) tls: MakeTls,
    /// None at all once it is closed.
    idle: Mutex<Option<Vec<Conn>>>,
    pub(super) readers: Semaphore,
    /// What this opening committed itself.
    pub(super) own: OwnRuns,
    /// What it left of the runs that it wrote to.
    pub(super) heads: KnownHeads,
    /// The host, by its place in the URL, and its address that were reached last.
    reached: Mutex<Option<(usize, Option<IpAddr>)>>,
    /// Whether one of several hosts could be written to before.
    pub(super) found_primary: AtomicBool,
    /// Whether one of those that were tried last, in vain, said that it is starting.
    pub(super) is_starting: AtomicBool,
    /// Which copy of the database it counts in; none before that is known, and where nothing is written.
    origin: tokio::sync::Mutex<Option<String>>,
}

impl Pool {
    pub(super) fn new(place: Arc<Place>) -> Result<Self, StoreError> {
        let tls = MakeTls::of(&place)?;
        Ok(Self {
            place,
            tls,
            idle: Mutex::new(Some(Vec::new())),
            readers: Semaphore::new(READERS),
            own: OwnRuns::default(),
            heads: KnownHeads::default(),
            reached: Mutex::default(),
            found_primary: AtomicBool::new(false),
            is_starting: AtomicBool::new(false),
            origin: tokio::sync::Mutex::default(),
        })
    }

    /// Keeps in mind which copy of the database this is, whose tables were looked at: another host, or the same address, may lead to another one later.
    pub(super) async fn keep_origin(&self, conn: &mut Conn) -> Result<(), StoreError> {
        if !self.place.read_only {
            let here = schema::origin(conn, &self.place).await?;
            *self.origin.lock().await = Some(here);
        }
        Ok(())
    }

    /// Before anything is written over a new connection: where it leads to another copy, numbers that were given out may not be known there.
    async fn check_origin(&self, conn: &mut Conn) -> Result<(), StoreError> {
        let known = self.origin.lock().await.clone();
        let Some(known) = known else { return Ok(()) };
        // Without the lock: connections are made side by side.
        if schema::is_same(&known, &schema::origin(conn, &self.place).await?) {
            return Ok(());
        }
        let mut origin = self.origin.lock().await;
        let Some(before) = origin.as_deref() else { return Ok(()) };
        if let Some(here) = schema::recheck(conn, &self.place, before).await? {
            // What was committed here before, the copy may not have.
            self.own.forget();
            self.heads.forget_all();
            self.forget_idle();
            *origin = Some(here);
        }
        Ok(())
    }

    pub(super) fn reached(&self) -> Option<(usize, Option<IpAddr>)> {
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who was reached last is not the one to write to: the order is that of the URL and of the name again.
    pub(super) fn forget_reached(&self) {
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn keep_reached(&self, at: usize, address: Option<IpAddr>) {
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner) = Some((at, address));
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Option<Vec<Conn>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection: an idle one, or a new one. It goes back with [`put`](Self::put), or is closed when it is dropped.
    pub(super) async fn get(&self) -> Result<Conn, StoreError> {
        loop {
            let conn = self.idle().as_mut().ok_or_else(StoreError::closed)?.pop();
            match conn {
                Some(conn) if conn.is_closed() => {}
                Some(conn) => return Ok(conn),
                None => break,
            }
        }
        self.connect().await
    }

    /// A new connection, driven by a task of its own.
    pub(super) async fn connect(&self) -> Result<Conn, StoreError> {
        let (mut conn, mut driver) = self.reach().await?;
        let moved = Arc::clone(&conn.moved);
        let driving = tokio::spawn(poll_fn(move |cx| {
            moved.note();
            // Whoever uses the connection is told the same.
            Pin::new(&mut driver).poll(cx).map(|ended| {
                let _told = ended.is_err();
            })
        }));
        conn.driver = Some(driving.abort_handle());
        conn.set_up(&self.place, false).await?;
        self.check_origin(&mut conn).await?;
        Ok(conn)
    }

    /// A new connection for work that need not wait for the disk; what the server tells unasked goes to `told`, until the connection ends.
    pub(super) async fn connect_for_messages(&self, told: mpsc::UnboundedSender<Notification>) -> Result<Conn, StoreError> {
        let (mut conn, mut driver) = self.reach().await?;
        let moved = Arc::clone(&conn.moved);
        let driving = tokio::spawn(async move {
            let mut next = async || {
                poll_fn(|cx| {
                    moved.note();
                    driver.poll_message(cx)
                })
                .await
            };
            while let Some(Ok(message)) = next().await {
                if let AsyncMessage::Notification(notification) = message {
                    let _nobody_follows = told.send(notification);
                }
            }
        });
        conn.driver = Some(driving.abort_handle());
        conn.set_up(&self.place, true).await?;
        Ok(conn)
    }

    /// Gives back a connection that is in no transaction and has met no error. As many are kept as work at once.
    pub(super) fn put(&self, conn: Conn) {
        if let Some(idle) = self.idle().as_mut().filter(|idle| idle.len() < self.place.flush_shards + READERS) {
            idle.push(conn);
        }
    }

    /// Closes what is idle: one of them was found dead, the others were made before it died.
    pub(super) fn forget_idle(&self) {
        if let Some(idle) = self.idle().as_mut() {
            idle.clear();
        }
    }

    /// Takes no more, and closes what is idle.
    pub(super) fn close(&self) {
        drop(self.idle().take());
    }
}
