//! Chance that is decided by the seed and by what is asked about, never by who asks first: every run with one seed is the same story.

/// A number from the seed and what it is about.
pub(crate) fn number(seed: u64, about: &[&str]) -> u64 {
    let mut state = mix(seed);
    for text in about {
        for byte in text.bytes() {
            state = mix(state ^ u64::from(byte));
        }
        state = mix(state ^ 0x1_00);
    }
    state
}

/// A number below `limit` (zero if that is zero).
pub(crate) fn below(limit: u64, seed: u64, about: &[&str]) -> u64 {
    number(seed, about).checked_rem(limit).unwrap_or(0)
}

/// The finaliser of splitmix64.
fn mix(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
