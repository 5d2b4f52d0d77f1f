//! Fencing tokens in hand: from blocks that were reserved durably, so that a grant costs no sync of its own.

use std::collections::VecDeque;
use std::ops::Range;

use crate::model::FencingToken;

/// How many are reserved at once. A crash loses what is left of a block; a counter of 64 bits does not mind.
pub(super) const BLOCK: u64 = 65_536;
/// The next block is asked for when fewer than this are left: at 100,000 grants a second that is 160 ms ahead.
const LOW: u64 = BLOCK / 4;

#[derive(Debug, Default)]
pub(super) struct Tokens {
    blocks: VecDeque<Range<u64>>,
    /// A block is on its way.
    reserving: bool,
}

impl Tokens {
    pub(super) fn next(&mut self) -> Option<FencingToken> {
        loop {
            let block = self.blocks.front_mut()?;
            match block.next() {
                Some(token) => return Some(FencingToken(token)),
                None => self.blocks.pop_front(),
            };
        }
    }

    /// Whether a block must be reserved now; whoever asks does it.
    pub(super) fn must_reserve(&mut self) -> bool {
        let left: u64 = self.blocks.iter().map(|block| block.end.saturating_sub(block.start)).sum();
        let must = left < LOW && !self.reserving;
        self.reserving |= must;
        must
    }

    /// A reservation has ended, with a block or without.
    pub(super) fn reserved(&mut self, block: Option<Range<u64>>) {
        self.reserving = false;
        self.blocks.extend(block);
    }
}
