//! The pause of who met others and tries again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// A pause that grows with the attempts and differs between processes, up to 32 ms: who met once does not meet again and again.
pub(crate) fn jitter(attempts: u32) -> Duration {
    let longest = 500_u64 << attempts.min(6);
    Duration::from_micros(RandomState::new().hash_one(attempts) % longest)
}
