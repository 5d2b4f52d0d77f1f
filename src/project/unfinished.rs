//! The mark of a move that has not ended. It stands in the target from before the first batch until all of it was compared, so that what a mover leaves behind
//! who is killed is opened by nobody for the whole state, also where the settings name the target already. Running the move again takes it away.
//!
//! It is a lock that outlasts its holder: every database has a place for one, and a program that does not know it passes over it. A file has none; nor has a
//! backend that keeps no locks for others to see.

use std::sync::Arc;

use super::copied::stable;
use super::exclusive::change;
use super::meanwhile::is_same_database;
use super::{Home, Move, Origin, ProjectError, ProjectErrorKind, Settings};
use crate::model::{Clock, FencingToken, LeaseKey, LeaseMutation, LeaseOwner, LeaseRecord, ProcessInfo, RunId, SystemClock};
use crate::store::moving::{UNFINISHED, cut_off, is_unfinished};
use crate::store::{LeaseStore, StateBackend, StoreError};

/// How long it lasts: about a hundred years.
const TTL_MS: u64 = 100 * 365 * 24 * 60 * 60 * 1_000;

/// The mark in the target of the move that is under way.
#[derive(Debug)]
pub(super) struct Unfinished {
    target: Arc<dyn StateBackend>,
    key: LeaseKey,
    token: FencingToken,
    /// This move has set it: no earlier one was cut off.
    pub(super) is_new: bool,
}

impl Unfinished {
    /// The mark that an earlier move from the same place has left.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Conflict`] if it is that of a move from another place: what is lacking of that one would be forgotten.
    pub(super) async fn left(
        target: &Arc<dyn StateBackend>,
        settings: &Settings,
        what: &Move,
        source: &str,
    ) -> Result<Option<Self>, ProjectError> {
        let mark = of_this_move(&**target, settings, what, source).await?;
        Ok(mark.map(|mark| Self { target: Arc::clone(target), key: mark.key, token: mark.token, is_new: false }))
    }

    /// Marks the target, durably; `None` where there is no place for a mark.
    pub(super) async fn set(target: &Arc<dyn StateBackend>, what: &Move, source: &str) -> Result<Option<Self>, ProjectError> {
        if !matches!(target.lease_store(), LeaseStore::Rows) {
            return Ok(None);
        }
        let key = LeaseKey::run(RunId::new(UNFINISHED).map_err(|error| ProjectError::input(error.to_string()))?);
        let at = SystemClock.now();
        let grant = LeaseMutation::Grant {
            key: key.clone(),
            // An opening of nobody: it cannot end.
            owner: LeaseOwner { process: ProcessInfo::current(at), name: command(what).into() },
            purpose: Some(purpose(source).into()),
            at,
            ttl_ms: TTL_MS,
        };
        match change(target, grant).await? {
            Ok(token) => Ok(token.map(|token| Self { target: Arc::clone(target), key, token, is_new: true })),
            Err(refusal) => Err(refusal.into()),
        }
    }

    /// Takes the mark away, durably.
    pub(super) async fn take_away(&self) -> Result<(), ProjectError> {
        let release = LeaseMutation::Release { key: self.key.clone(), token: self.token };
        change(&self.target, release).await?.map(|_| ()).map_err(ProjectError::from)
    }
}

/// The mark that stands in a state.
async fn found(backend: &dyn StateBackend) -> Result<Option<LeaseRecord>, StoreError> {
    if !matches!(backend.lease_store(), LeaseStore::Rows) {
        return Ok(None);
    }
    Ok(backend.list_leases().await?.into_iter().find(is_unfinished))
}

/// What whoever reads a state is told of it. What cannot be read he is told where he asks for it.
pub(super) async fn notice(backend: &dyn StateBackend) -> Option<String> {
    let mark = found(backend).await.ok()??;
    Some(cut_off(&backend.location(), &mark))
}

/// Refuses to leave a state that is not whole.
pub(super) async fn refuse_part(source: &dyn StateBackend) -> Result<(), ProjectError> {
    let Some(mark) = found(source).await? else { return Ok(()) };
    Err(ProjectError::new(ProjectErrorKind::Conflict, cut_off(&source.location(), &mark)))
}

/// The mark of this move, if it stands; one of another move is refused.
pub(super) async fn of_this_move(
    target: &dyn StateBackend,
    settings: &Settings,
    what: &Move,
    source: &str,
) -> Result<Option<LeaseRecord>, ProjectError> {
    let Some(mark) = found(target).await? else { return Ok(None) };
    // The file and the database beside it go wherever their folder goes: a path says nothing of them.
    let is_beside = what.from == Origin::Home(Home::File) && !Origin::from(what.to).is_on_server(settings);
    if is_from(&mark, source) || is_beside && *mark.owner.name == *command(what) {
        return Ok(Some(mark));
    }
    let told = cut_off(&target.location(), &mark);
    Err(ProjectError::new(ProjectErrorKind::Conflict, format!("{told}. This move comes from {source}")))
}

/// Which move it is: from where. A path is named whole, because others may read it in another folder.
fn purpose(source: &str) -> String {
    format!("{STATE_OF}{}{IS_MOVED}", stable(source))
}

const STATE_OF: &str = "the state of ";
const IS_MOVED: &str = " is being moved here";

/// Whether a mark is that of a move from this place. A server may be spelled in another way this time.
fn is_from(mark: &LeaseRecord, source: &str) -> bool {
    let named = mark.purpose.as_deref().and_then(|purpose| purpose.strip_prefix(STATE_OF)?.strip_suffix(IS_MOVED));
    let is_server = |place: &str| place.contains("://");
    named.is_some_and(|named| named == stable(source) || is_server(named) && is_server(source) && is_same_database(named, source))
}

/// The command that goes on with a move. A URL may hold a secret, and is for the caller to write.
fn command(what: &Move) -> String {
    let from = match &what.from {
        Origin::Home(Home::File) => "file",
        Origin::Home(Home::Database) => "database",
        Origin::Sqlite => "sqlite",
        Origin::Url(_) => "URL",
    };
    format!("seeknal migrate-state --backend {} --from {from} --no-dry-run", what.to.name())
}
