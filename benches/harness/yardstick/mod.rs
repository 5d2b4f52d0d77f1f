//! What the product is measured against: the least that any program must do for the same result.

mod bare_locks;
mod database;
mod journal;
mod mutexed;
mod raw_loop;

pub(crate) use bare_locks::BareLocks;
pub(crate) use journal::RawJournal;
pub(crate) use mutexed::Mutexed;
pub(crate) use raw_loop::{RawLoop, Rows};
