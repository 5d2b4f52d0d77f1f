//! Several runs at one moment, for backends that can only read them one by one.

use super::{StateBackend, StoreError, StoreErrorKind};
use crate::model::{RunId, RunState, Version};

/// How often runs that change meanwhile are read again.
const ROUNDS: u32 = 64;

/// Reads until the versions are the same before and after: a version never comes back, so nothing was written between.
pub(super) async fn reload_runs<B: StateBackend + ?Sized>(
    backend: &B,
    runs: &[(RunId, Option<RunState>)],
) -> Result<Vec<Option<RunState>>, StoreError> {
    let (ids, mut states): (Vec<RunId>, Vec<Option<RunState>>) = runs.iter().cloned().unzip();
    let mut before = backend.run_versions(&ids).await?;
    for _ in 0..ROUNDS {
        for ((id, state), version) in ids.iter().zip(&mut states).zip(&before) {
            if version_of(state.as_ref()) != *version {
                *state = match &*state {
                    Some(have) => backend.reload_run(have).await?,
                    None => backend.load_run(id).await?,
                };
            }
        }
        let after = backend.run_versions(&ids).await?;
        if after == before && states.iter().map(Option::as_ref).map(version_of).eq(after.iter().copied()) {
            return Ok(states);
        }
        before = after;
    }
    let what = format!(
        "{}: {} runs change faster than they can be read together; see who writes with `seeknal state locks`, and try again",
        backend.location(),
        ids.len()
    );
    Err(StoreError::not_applied(StoreErrorKind::Busy, what))
}

fn version_of(state: Option<&RunState>) -> Option<Version> {
    state.map(RunState::version)
}
