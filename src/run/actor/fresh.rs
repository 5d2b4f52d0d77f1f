//! Who wants the run as it is in storage, and who holds it.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Found, Mode, State};
use crate::model::Snapshot;
use crate::run::handle::{HoldGrant, Release};

/// Who waits for a fresh load.
pub(super) enum Fresh {
    Hold(oneshot::Sender<HoldGrant>),
    Read(oneshot::Sender<Option<Snapshot>>),
}

impl State {
    /// Loads the run for somebody; it goes on with [`loaded_for`](Self::loaded_for).
    pub(super) fn load_for(&mut self, fresh: Fresh) {
        self.fresh = Some(fresh);
        self.recover(true);
    }

    /// Answers who wants to read it, all that was sent before being settled: from here, unless others wrote since.
    pub(super) fn read(&mut self, found: Option<Found>, reply: oneshot::Sender<Option<Snapshot>>) {
        if found.is_some_and(|found| self.lacks(found)) {
            self.load_for(Fresh::Read(reply));
        } else {
            // What is committed, whatever deferred writes were seen before and fell.
            self.publish();
            let _caller_gone = reply.send(self.cell.snapshot());
        }
    }

    /// The run is loaded, and published.
    pub(super) fn loaded_for(&mut self, fresh: Fresh) {
        match fresh {
            Fresh::Hold(reply) => self.hold(reply),
            Fresh::Read(reply) => {
                let _caller_gone = reply.send(self.cell.snapshot());
            }
        }
    }

    pub(super) fn hold(&mut self, reply: oneshot::Sender<HoldGrant>) {
        self.mode = Mode::Held;
        // What holds it may commit before the actor hears of it.
        self.cell.set_unsettled(true);
        self.cell.set_doubtful(true);
        let grant = HoldGrant::new(self.chain.committed().cloned(), Arc::clone(&self.cell), self.myself.clone());
        // A grant that nobody takes releases itself as it is dropped.
        drop(reply.send(grant));
    }

    pub(super) fn released(&mut self, release: Release) {
        if self.mode != Mode::Held {
            return;
        }
        self.mode = Mode::Ready;
        match release {
            Release::Unchanged => {}
            Release::Moved(state) => {
                self.chain.reload(state);
                self.publish();
            }
            Release::Reload => self.recover(true),
        }
        if std::mem::take(&mut self.reload_again) {
            self.recover(true);
        }
        self.go_on();
    }
}
