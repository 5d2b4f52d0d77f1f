//! A worker process: executors that claim what is ready, work, and tell that it is done.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use seeknal_state::{ClaimFilter, Coordinator, Error, Next, NodeUpdate, RunId, StateBackend, StoreError};
use tokio::task::JoinSet;

use crate::ack::{Scribe, Subject};
use crate::{Failure, Task, chance};

/// How long an executor waits before it asks whether there is nothing left.
const PATIENCE: Duration = Duration::from_secs(2);

/// Works until the run is drained.
pub(crate) async fn run(
    backend: Result<Arc<dyn StateBackend>, StoreError>,
    run: &str,
    name: &str,
    ack_log: &Path,
    work: &Task,
) -> Result<(), Failure> {
    let run = RunId::new(run)?;
    let state = Coordinator::builder().lease_ttl(work.ttl()).open(backend?).await?;
    let scribe = Arc::new(Scribe::open(ack_log, name)?);
    let mut executors = JoinSet::new();
    for index in 0..work.executors {
        let filter = ClaimFilter::new().owner(format!("{name}/{index}")).ttl(work.ttl()).wait(PATIENCE);
        executors.spawn(execute(state.clone(), run.clone(), filter, Arc::clone(&scribe), work.clone()));
    }
    while let Some(ended) = executors.join_next().await {
        ended??;
    }
    state.close().await?;
    Ok(())
}

async fn execute(state: Coordinator, run: RunId, filter: ClaimFilter, scribe: Arc<Scribe>, work: Task) -> Result<(), Failure> {
    loop {
        let claim = match state.claim_next(&run, filter.clone()).await {
            Ok(Next::Claimed(claim)) => claim,
            Ok(Next::Drained { .. }) => return Ok(()),
            Ok(_) => continue,
            // A storage that is away for a moment, or an answer that was lost: whatever was claimed then is given back or taken over.
            Err(error) if error.is_retryable() || error.is_unknown_outcome() || error.is_lease_lost() => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let subject = Subject::of(&claim);
        scribe.note(&subject, "running", Some(claim.commit()))?;
        let about = [claim.node_id().as_str(), &claim.attempt().to_string()];
        let pause = chance::below(work.work_ms.saturating_add(1), work.seed, &about);
        if pause > 0 {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        match claim.complete(NodeUpdate::success().row_count(pause)).await {
            Ok(commit) => scribe.note(&subject, "success", Some(&commit))?,
            Err(Error::LeaseLost(_) | Error::Conflict(_)) => scribe.note(&subject, "refused", None)?,
            // Not told to be done, so not noted: it may be done, or is given back.
            Err(error) if error.is_retryable() || error.is_unknown_outcome() => {}
            Err(error) => return Err(error.into()),
        }
    }
}
