//! What the product is measured against: the least that any program must do for the same result.

mod bare_thread;
mod database;
mod journal;
mod mutexed;
#[cfg(feature = "postgres")]
mod postgres;
mod raw_loop;

pub(crate) use bare_thread::BareThread;
pub(crate) use journal::RawJournal;
pub(crate) use mutexed::Mutexed;
#[cfg(feature = "postgres")]
pub(crate) use postgres::{RawPostgres, schema_of};
pub(crate) use raw_loop::{RawLoop, Rows};
