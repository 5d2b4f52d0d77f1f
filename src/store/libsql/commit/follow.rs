//! Whether others have committed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use crate::store::StoreError;
use crate::store::libsql::client::Client;
use crate::store::libsql::read;

/// Notices the commits of others.
#[derive(Debug, Default)]
pub(in crate::store::libsql) struct Follow {
    /// The commit sequence up to which everything was made here, or was told.
    known: AtomicU64,
    /// The highest commit sequence that was ever heard of: less than that has only a server whose older state was brought back.
    highest: AtomicU64,
    /// Grows when a commit begins and when it ends.
    moves: AtomicU64,
    /// Commits on their way.
    under_way: AtomicU64,
    foreign: AtomicBool,
    news: Notify,
}

impl Follow {
    /// The commit sequence up to which everything is known.
    pub(super) fn known(&self) -> u64 {
        self.known.load(Ordering::SeqCst)
    }

    /// The highest commit sequence that was ever heard of.
    pub(super) fn highest(&self) -> u64 {
        self.highest.load(Ordering::SeqCst)
    }

    /// Everything up to here is known; `others`: and some of it was not made here.
    pub(super) fn advance(&self, seq: u64, others: bool) {
        self.known.fetch_max(seq, Ordering::SeqCst);
        self.highest.fetch_max(seq, Ordering::SeqCst);
        if others {
            self.foreign.store(true, Ordering::SeqCst);
            self.news.notify_one();
        }
    }

    /// Waits until others may have committed; asks the server as often as `every` says.
    pub(in crate::store::libsql) async fn others(&self, client: &Client, every: Duration) -> Result<(), StoreError> {
        loop {
            if self.foreign.swap(false, Ordering::SeqCst) {
                return Ok(());
            }
            tokio::select! {
                () = self.news.notified() => continue,
                () = tokio::time::sleep(every) => {}
            }
            // A commit that is on its way tells by itself whether others were there.
            let moves = self.moves.load(Ordering::SeqCst);
            if self.under_way.load(Ordering::SeqCst) > 0 {
                continue;
            }
            let seq = read::seq(client).await?;
            self.highest.fetch_max(seq, Ordering::SeqCst);
            if self.moves.load(Ordering::SeqCst) == moves && seq != self.known.load(Ordering::SeqCst) {
                // A smaller one, too: somebody brought a backup back.
                self.known.store(seq, Ordering::SeqCst);
                return Ok(());
            }
        }
    }
}

/// Says that a commit is on its way, as long as it lives.
pub(super) struct OnTheWay<'f>(&'f Follow);

impl<'f> OnTheWay<'f> {
    pub(super) fn begin(follow: &'f Follow) -> Self {
        follow.under_way.fetch_add(1, Ordering::SeqCst);
        follow.moves.fetch_add(1, Ordering::SeqCst);
        Self(follow)
    }
}

impl Drop for OnTheWay<'_> {
    fn drop(&mut self) {
        self.0.moves.fetch_add(1, Ordering::SeqCst);
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}
