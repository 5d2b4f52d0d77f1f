//! What is measured against what, and what it should reach.

use std::fmt;
use std::path::Path;

use tokio::runtime::Runtime;

use crate::Outcome;
use crate::goal::Goal;
use crate::measure::{Contender, Sides};
use crate::processes::Processes;
use crate::workload::{Product, Work};
#[cfg(feature = "postgres")]
use crate::yardstick::RawPostgres;
use crate::yardstick::{BareThread, Mutexed, RawJournal, RawLoop, Rows};

/// Where the state rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Memory,
    File,
    Sqlite,
    /// A libSQL server of its own, on the loopback.
    #[cfg(feature = "libsql")]
    Libsql,
    /// The same; every write is a request of its own.
    #[cfg(feature = "libsql")]
    LibsqlSingly,
    #[cfg(feature = "postgres")]
    Postgres,
    /// Nowhere: the ceiling of everything above the backends.
    Null,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Memory => "memory",
            Self::File => "file",
            Self::Sqlite => "sqlite",
            #[cfg(feature = "libsql")]
            Self::Libsql => "libsql",
            #[cfg(feature = "libsql")]
            Self::LibsqlSingly => "libsql singly",
            #[cfg(feature = "postgres")]
            Self::Postgres => "postgres",
            Self::Null => "null sink",
        })
    }
}

/// What the product is measured against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Yardstick {
    /// The same rows in SQLite, by a loop on one thread.
    RawSqlite { rows: Rows, batch: usize },
    /// The same rows in PostgreSQL, by a loop on one connection.
    #[cfg(feature = "postgres")]
    RawPostgres { batch: usize },
    /// The same lines in a journal, by a loop on one thread.
    RawJournal { batch: usize },
    /// `Mutex<Connection>`, one commit a write, a thread for every client.
    Mutexed,
    /// Our own actors over a backend that does nothing.
    NullSink,
    /// A thread that commits rows of locks in groups.
    BareLocks,
    /// A thread that commits the rows of transitions in groups, for clients that wait for it.
    BareThread,
    /// The product itself on a libSQL server, one request for every write.
    #[cfg(feature = "libsql")]
    LibsqlSingly,
    /// One process with as many clients as each of two has.
    OneProcess,
}

impl fmt::Display for Yardstick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RawSqlite { rows, batch } => write!(f, "raw sqlite {rows} x{batch}"),
            #[cfg(feature = "postgres")]
            Self::RawPostgres { batch } => write!(f, "raw postgres x{batch}"),
            Self::RawJournal { batch } => write!(f, "raw journal x{batch}"),
            Self::Mutexed => f.write_str("Mutex<Connection>"),
            Self::NullSink => f.write_str("null sink"),
            Self::BareLocks => f.write_str("bare lock thread"),
            Self::BareThread => f.write_str("bare group-commit thread"),
            #[cfg(feature = "libsql")]
            Self::LibsqlSingly => f.write_str("one request a write"),
            Self::OneProcess => f.write_str("one process alone"),
        }
    }
}

/// One comparison.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) work: Work,
    pub(crate) backend: Backend,
    pub(crate) clients: usize,
    /// What is asked of the rate itself.
    pub(crate) goal: Option<Goal>,
    pub(crate) against: Vec<(Yardstick, Option<Goal>)>,
}

impl Case {
    fn new(work: Work, backend: Backend, clients: usize) -> Self {
        Self { work, backend, clients, goal: None, against: Vec::new() }
    }

    fn against(mut self, yardstick: Yardstick, goal: Option<f64>) -> Self {
        self.against.push((yardstick, goal.map(Goal::Ratio)));
        self
    }

    /// What `--only` looks at.
    pub(crate) fn name(&self) -> String {
        let backend = self.backend.to_string().replace(' ', "-");
        format!("{}/{backend}/{}", self.work, self.clients)
    }

    /// Opens all sides, each in a folder of its own.
    pub(crate) fn contenders(&self, runtime: &Runtime, folder: &Path) -> Outcome<Sides> {
        let home = folder.join("product");
        let product: Box<dyn Contender> = if self.work == Work::Together {
            Box::new(Processes::start(runtime, &home, 2, self.clients)?)
        } else {
            Box::new(Product::open(runtime, self.work, self.backend, self.clients, &home)?)
        };
        let mut yardsticks: Vec<Box<dyn Contender>> = Vec::new();
        for (index, (yardstick, _)) in self.against.iter().enumerate() {
            let folder = folder.join(format!("yardstick-{index}"));
            yardsticks.push(match *yardstick {
                Yardstick::RawSqlite { rows, batch } => {
                    Box::new(RawLoop::open(runtime, &folder, rows, batch, self.work.width())?)
                }
                #[cfg(feature = "postgres")]
                Yardstick::RawPostgres { batch } => Box::new(RawPostgres::open(runtime, &folder, batch)?),
                Yardstick::RawJournal { batch } => Box::new(RawJournal::create(&folder, batch, self.work.width())?),
                Yardstick::Mutexed => Box::new(Mutexed::open(runtime, &folder, self.clients)?),
                Yardstick::NullSink => Box::new(Product::open(runtime, self.work, Backend::Null, self.clients, &folder)?),
                Yardstick::OneProcess => Box::new(Processes::start(runtime, &folder, 1, self.clients)?),
                #[cfg(feature = "libsql")]
                Yardstick::LibsqlSingly => {
                    Box::new(Product::open(runtime, self.work, Backend::LibsqlSingly, self.clients, &folder)?)
                }
                Yardstick::BareLocks => Box::new(BareThread::locks(runtime, &folder, self.clients)?),
                Yardstick::BareThread => Box::new(BareThread::transitions(runtime, &folder, self.clients, self.work.width())?),
            });
        }
        Ok(Sides { product, yardsticks })
    }
}

/// Half of the clients are in the batch while the other half is collected.
fn forming(clients: usize) -> usize {
    (clients / 2).max(1)
}

/// All comparisons; a few small ones with `quick`.
pub(crate) fn cases(quick: bool) -> Vec<Case> {
    let clients: &[usize] = if quick { &[1, 16] } else { &[1, 16, 256, 4096] };
    let mut cases = Vec::new();
    durable(&mut cases, clients);
    transactions(&mut cases, clients);
    #[cfg(feature = "libsql")]
    libsql(&mut cases, clients);
    for backend in [Backend::Memory, Backend::File, Backend::Sqlite] {
        cases.extend(
            clients.iter().map(|clients| Case::new(Work::Deferred, backend, *clients).against(Yardstick::NullSink, None)),
        );
    }
    let backends = [Backend::Memory, Backend::File, Backend::Sqlite];
    for (work, backend) in [Work::Snapshot, Work::SnapshotBesideWriter, Work::NodeState]
        .into_iter()
        .flat_map(|work| backends.iter().map(move |backend| (work, *backend)))
    {
        for clients in clients {
            let mut case = Case::new(work, backend, *clients);
            // One reader, 1 µs a read.
            case.goal = (work != Work::NodeState && *clients == 1).then_some(Goal::Rate(1_000_000.0));
            cases.push(case);
        }
    }
    locks(&mut cases, clients);
    for clients in clients.iter().copied().filter(|clients| *clients <= 256) {
        // How many clients is not said where this is asked for: of the usual ones all.
        cases.push(Case::new(Work::Together, Backend::Sqlite, clients).against(Yardstick::OneProcess, Some(0.8)));
    }
    cases
}

fn durable(cases: &mut Vec<Case>, clients: &[usize]) {
    let work = Work::Durable;
    for clients in clients.iter().copied() {
        let batch = forming(clients);
        let raw = |rows| Yardstick::RawSqlite { rows, batch };
        let goal = match clients {
            1 => Some(0.8),
            16 => Some(1.1),
            256 => Some(0.9),
            _ => None,
        };
        let mut sqlite = Case::new(work, Backend::Sqlite, clients)
            .against(raw(Rows::Same), goal)
            .against(raw(Rows::Sorted), None)
            .against(raw(Rows::Gathered), None)
            .against(raw(Rows::NodesAlone), None);
        if clients <= 256 {
            sqlite = sqlite.against(Yardstick::BareThread, None);
            sqlite = sqlite.against(Yardstick::Mutexed, (clients == 256).then_some(15.0));
        }
        if clients == 256 {
            // Beside the batch that forms by itself the one of all clients.
            let batch = clients;
            sqlite = sqlite
                .against(Yardstick::RawSqlite { rows: Rows::Same, batch }, None)
                .against(Yardstick::RawSqlite { rows: Rows::NodesAlone, batch }, None);
        }
        cases.push(sqlite);
        let mut file = Case::new(work, Backend::File, clients)
            .against(Yardstick::RawJournal { batch }, None)
            .against(Yardstick::NullSink, (clients == 256).then_some(0.55));
        if clients == 256 {
            file = file.against(Yardstick::RawJournal { batch: clients }, None);
        }
        cases.push(file);
        #[cfg(feature = "postgres")]
        if clients == 256 {
            let raw = Yardstick::RawPostgres { batch };
            cases.push(Case::new(work, Backend::Postgres, clients).against(raw, Some(0.7)));
        }
        cases.push(Case::new(work, Backend::Memory, clients).against(Yardstick::NullSink, None));
    }
}

/// Only where there is a server: `.ci/check setup` installs one.
#[cfg(feature = "libsql")]
fn libsql(cases: &mut Vec<Case>, clients: &[usize]) {
    if !crate::sqld::path().is_file() {
        return;
    }
    for clients in clients.iter().copied().filter(|clients| *clients <= 256) {
        let goal = (clients == 256).then_some(10.0);
        cases.push(Case::new(Work::Durable, Backend::Libsql, clients).against(Yardstick::LibsqlSingly, goal));
    }
}

fn transactions(cases: &mut Vec<Case>, clients: &[usize]) {
    for clients in clients.iter().copied() {
        let batch = forming(clients);
        let case = |backend| Case::new(Work::Transaction, backend, clients);
        let sqlite = case(Backend::Sqlite).against(Yardstick::RawSqlite { rows: Rows::Same, batch }, None);
        cases.push(sqlite.against(Yardstick::NullSink, None));
        let file = case(Backend::File).against(Yardstick::RawJournal { batch }, None);
        cases.push(file.against(Yardstick::NullSink, None));
        cases.push(case(Backend::Memory).against(Yardstick::NullSink, None));
    }
}

fn locks(cases: &mut Vec<Case>, clients: &[usize]) {
    for backend in [Backend::Memory, Backend::File, Backend::Sqlite] {
        for work in [Work::LockApart, Work::LockOne] {
            for clients in clients.iter().copied() {
                // One client hands over to nobody, and thousands that wait for one lock of a database measure only how long a queue is.
                if work == Work::LockOne && (clients == 1 || (clients > 256 && backend == Backend::Sqlite)) {
                    continue;
                }
                let mut case = Case::new(work, backend, clients);
                if work == Work::LockApart && backend != Backend::Sqlite && clients >= 16 {
                    case.goal = Some(Goal::Rate(100_000.0));
                }
                if work == Work::LockApart && backend == Backend::Sqlite && clients <= 256 {
                    case = case.against(Yardstick::BareLocks, (clients == 16).then_some(0.8));
                }
                cases.push(case);
            }
        }
    }
}
