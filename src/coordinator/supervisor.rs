//! The supervisor of the run actors, and the sweep that sends idle runs to sleep.
//!
//! ```text
//! run actor ──(dies)──► supervisor ──► directory forgets it, a successor loads behind what it had sent down
//! sweep ──Passivate──► run actors that were not used since the last sweep
//! ```

use std::sync::{Arc, Weak};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use tokio::time::Instant;

use super::Engine;
use super::directory::Directory;

/// Between two looks at a directory that has too many runs.
const THINNING: Duration = Duration::from_millis(10);

/// Where an embedder means never.
const NEVER: Duration = Duration::from_secs(30 * 365 * 86_400);

#[derive(Debug)]
pub(crate) enum Msg {
    Watch(Weak<Directory>),
}

struct Supervisor;

pub(super) async fn start() -> Result<(ActorRef<Msg>, tokio::task::JoinHandle<()>), SpawnErr> {
    Actor::spawn(None, Supervisor, ()).await
}

#[cfg_attr(seeknal_ractor_async_trait, ractor::async_trait)]
impl Actor for Supervisor {
    type Msg = Msg;
    type State = Weak<Directory>;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<Msg>, (): ()) -> Result<Weak<Directory>, ActorProcessingErr> {
        Ok(Weak::new())
    }

    async fn handle(&self, _: ActorRef<Msg>, message: Msg, state: &mut Weak<Directory>) -> Result<(), ActorProcessingErr> {
        let Msg::Watch(directory) = message;
        *state = directory;
        Ok(())
    }

    // The default would end the supervisor, and all runs with it, when one actor dies.
    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Msg>,
        event: SupervisionEvent,
        state: &mut Weak<Directory>,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, error) = match event {
            SupervisionEvent::ActorFailed(actor, error) => (actor, error.to_string()),
            // Its task was taken away. One that ends by itself, or is ended by us, gives no reason.
            SupervisionEvent::ActorTerminated(actor, _, Some(reason)) => (actor, reason),
            _ => return Ok(()),
        };
        if let Some(directory) = state.upgrade()
            && let Some(run) = directory.crashed(actor.get_id())
        {
            tracing::error!(%run, %error, "the actor of a run died; it is started again from what is in storage");
            drop(tokio::spawn(async move {
                if let Err(error) = directory.existing(&run).await {
                    tracing::error!(%run, %error, "a run could not be started again; the next use tries once more");
                }
            }));
        }
        Ok(())
    }
}

/// Begins to watch the runs of an engine, until it is dropped or closed.
pub(super) fn watch(engine: &Arc<Engine>) {
    let _watching = engine.supervisor.cast(Msg::Watch(Arc::downgrade(&engine.directory)));
    let (engine, pause, resident) = (Arc::downgrade(engine), engine.limits.idle_after, Arc::downgrade(&engine.directory));
    drop(tokio::spawn(async move {
        let next = || Instant::now().checked_add(pause).unwrap_or_else(|| Instant::now() + NEVER);
        let mut due = next();
        loop {
            let Some(directory) = resident.upgrade() else { return };
            // The directory alone: who waits here must not keep a coordinator that nobody uses from closing.
            let crowded = Instant::now() < due && tokio::time::timeout_at(due, directory.crowded()).await.is_ok();
            drop(directory);
            let Some(engine) = engine.upgrade() else { return };
            if engine.is_closed() {
                return;
            }
            if crowded {
                thin_out(&engine);
                drop(engine);
                // Until those that were sent to sleep are gone, so that no more of them are. Those with writes on their way stay for now.
                tokio::time::sleep(THINNING).await;
                if let Some(directory) = resident.upgrade() {
                    directory.tell_if_crowded();
                }
            } else {
                sweep(&engine);
                due = next();
            }
        }
    }));
}

/// Sends an eighth of the runs that may be resident to sleep, and those beyond.
fn thin_out(engine: &Engine) {
    let bound = engine.limits.resident_runs;
    let spare = engine.directory.len().saturating_sub(bound);
    if spare == 0 {
        return;
    }
    let (used, idle): (Vec<_>, Vec<_>) = engine.directory.resident().into_iter().partition(|handle| handle.cell().is_used());
    for handle in idle.iter().chain(&used).take(spare.saturating_add(bound / 8)) {
        handle.passivate();
    }
}

/// Sends the runs to sleep that were not used since the last sweep, and if there are too many, also used ones.
fn sweep(engine: &Engine) {
    let mut spare = engine.directory.len().saturating_sub(engine.limits.resident_runs);
    let (used, idle): (Vec<_>, Vec<_>) = engine.directory.resident().into_iter().partition(|handle| handle.cell().take_used());
    for handle in &idle {
        handle.passivate();
    }
    spare = spare.saturating_sub(idle.len());
    for handle in used.iter().take(spare) {
        handle.passivate();
    }
}
