//! Looking after the claims of others: what they committed, and whose leases are gone.

use std::sync::Arc;

use super::Engine;
use super::board::Board;
use crate::error::Error;

impl Engine {
    /// Brings a board up to date with what it cannot know by itself.
    pub(super) async fn look(&self, board: &Arc<Board>) -> Result<(), Error> {
        self.follow_up(board.run(), Some(board.version())).await?;
        // The version first: a lease that is held under what the board shows is among those that are listed after it.
        let version = board.version();
        let leases = self.leases.list().await?;
        board.looked(version, &leases);
        Ok(())
    }
}
