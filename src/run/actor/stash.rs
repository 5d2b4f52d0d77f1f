//! What waits for its turn, in the order in which it came.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use super::Found;
use crate::model::Snapshot;
use crate::run::handle::HoldGrant;
use crate::run::op::Envelope;

/// What arrived while it could not be done.
pub(super) enum Stashed {
    Commit(Envelope),
    Hold { fresh: bool, reply: oneshot::Sender<HoldGrant> },
    Read { found: Option<Found>, reply: oneshot::Sender<Option<Snapshot>> },
    Flush(oneshot::Sender<()>),
}

impl Stashed {
    /// Whether nobody waits for it any more. A commit has a permit, and happens whoever waits for it.
    fn is_abandoned(&self) -> bool {
        match self {
            Self::Commit(_) => false,
            Self::Hold { reply, .. } => reply.is_closed(),
            Self::Read { reply, .. } => reply.is_closed(),
            Self::Flush(reply) => reply.is_closed(),
        }
    }
}

/// So many are kept without a look at who has gone away.
const UNSEEN: usize = 64;

/// The stash. What takes no permit is bounded by who still waits for it: while storage stands still callers may come and go without end.
#[derive(Default)]
pub(super) struct Stash {
    items: VecDeque<Stashed>,
    /// How many were kept at the last look.
    kept: usize,
}

impl Stash {
    pub(super) fn push(&mut self, item: Stashed) {
        // Only when it has doubled, so that looking costs each of them little.
        if self.items.len() >= self.kept.saturating_mul(2).max(UNSEEN) {
            self.items.retain(|item| !item.is_abandoned());
            self.kept = self.items.len();
        }
        self.items.push_back(item);
    }

    pub(super) fn first(&self) -> Option<&Stashed> {
        self.items.front()
    }

    pub(super) fn pop_first(&mut self) -> Option<Stashed> {
        self.items.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.items.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gives_up_waiting_leaves_nothing_behind() {
        let mut stash = Stash::default();
        let waiting: Vec<_> = (0..200)
            .map(|_| {
                let (reply, waiting) = oneshot::channel();
                stash.push(Stashed::Flush(reply));
                waiting
            })
            .collect();
        for number in 0..10_000 {
            stash.push(match number % 3 {
                0 => Stashed::Flush(oneshot::channel().0),
                1 => Stashed::Read { found: None, reply: oneshot::channel().0 },
                _ => Stashed::Hold { fresh: true, reply: oneshot::channel().0 },
            });
        }
        assert!(stash.items.len() <= 2 * waiting.len() + UNSEEN, "{}", stash.items.len());
        let answered = std::iter::from_fn(|| stash.pop_first()).filter(|item| !item.is_abandoned()).count();
        assert_eq!(answered, waiting.len(), "who still waits is answered");
    }
}
