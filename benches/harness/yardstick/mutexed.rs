//! What one writes by hand first: `Mutex<Connection>`, one commit a write, a thread for every client.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use tokio::runtime::Runtime;

use super::database::{self, PUT_NODE, STAMP};
use crate::Outcome;
use crate::measure::{Contender, Dice, Sample};
use crate::workload::{Field, NODES, RUNS};

/// It writes the node's row alone: no versions, no guards, no batch ids.
pub(crate) struct Mutexed {
    conn: Mutex<Connection>,
    field: Field,
    clients: usize,
    rounds: u64,
}

impl Mutexed {
    pub(crate) fn open(runtime: &Runtime, folder: &Path, clients: usize) -> Outcome<Self> {
        let field = Field::new(RUNS, NODES)?;
        let conn = Mutex::new(database::sown(runtime, folder, &field, false)?);
        Ok(Self { conn, field, clients, rounds: 0 })
    }

    fn client(&self, seed: u64, until: Instant) -> Outcome<u64> {
        let mut dice = Dice::new(seed);
        let mut operations = 0;
        while Instant::now() < until {
            let (Some(run), Some(node)) = (self.field.runs.get(dice.below(RUNS)), self.field.nodes.get(dice.below(NODES))) else {
                return Err("the field is smaller than the dice".into());
            };
            let rows = i64::try_from(dice.next() >> 24)?;
            let none: Option<&str> = None;
            let conn = self.conn.lock().unwrap_or_else(PoisonError::into_inner);
            conn.prepare_cached(PUT_NODE)?.execute(params![
                run.as_str(),
                node.as_str(),
                "success",
                1,
                none,
                STAMP,
                none,
                rows,
                none,
                none,
                none,
                none,
                none,
                operations,
                STAMP
            ])?;
            operations += 1;
        }
        Ok(u64::try_from(operations)?)
    }
}

impl Contender for Mutexed {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        self.rounds += 1;
        let started = Instant::now();
        let until = started + lasting;
        let operations = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.clients)
                .map(|index| {
                    let seed = self.rounds << 32 | u64::try_from(index)?;
                    let this = &*self;
                    let thread = std::thread::Builder::new().stack_size(256 * 1024);
                    Ok(thread.spawn_scoped(scope, move || this.client(seed, until))?)
                })
                .collect::<Outcome<_>>()?;
            let mut operations = 0;
            for thread in threads {
                operations += thread.join().map_err(|_| "a client panicked")??;
            }
            Ok::<u64, crate::Fault>(operations)
        })?;
        Ok(Sample { operations, took: started.elapsed(), latencies: Vec::new() })
    }
}
