//! What a caller may say about the lock it asks for.

use std::sync::Arc;
use std::time::Duration;

use crate::model::InputError;

const DEFAULT_TTL: Duration = Duration::from_secs(30);
const MIN_TTL: Duration = Duration::from_millis(1);
const MAX_TTL: Duration = Duration::from_secs(3600);
/// A renewal goes out every third of the TTL and must be answered before the rest is over; a commit on a busy disk takes tens of milliseconds.
const MIN_KEPT_ALIVE_TTL: Duration = Duration::from_millis(100);
const MAX_TEXT_BYTES: usize = 1024;

/// How a lock is asked for.
///
/// | option | default | |
/// |---|---|---|
/// | [`owner`](Self::owner) | none | a name: with it, re-entry and cycles of waiters are found |
/// | [`purpose`](Self::purpose) | none | shown wherever locks are listed |
/// | [`ttl`](Self::ttl) | the coordinator's `lease_ttl`, 30 s | 1 ms to 1 h; at least 100 ms if the lease is kept alive |
/// | [`keep_alive`](Self::keep_alive) | yes | renewed as long as its guard lives |
/// | [`reentrant`](Self::reentrant) | no | the same owner may take the same lock again |
#[derive(Debug, Clone)]
#[must_use = "options do nothing until a lock is asked for with them"]
pub struct LockOptions {
    owner: Option<Arc<str>>,
    purpose: Option<Arc<str>>,
    ttl: Option<Duration>,
    keep_alive: bool,
    reentrant: bool,
}

impl Default for LockOptions {
    fn default() -> Self {
        Self { owner: None, purpose: None, ttl: None, keep_alive: true, reentrant: false }
    }
}

impl LockOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names the owner: one line of control, such as an executor. An owner who waits for itself, or in a cycle with others of this process, is
    /// refused. Without a name every call is an owner of its own.
    pub fn owner(mut self, name: impl AsRef<str>) -> Self {
        self.owner = Some(Arc::from(name.as_ref()));
        self
    }

    /// Says what the lock is for, to those who list locks.
    pub fn purpose(mut self, text: impl AsRef<str>) -> Self {
        self.purpose = Some(Arc::from(text.as_ref()));
        self
    }

    /// How long the lease lasts without a renewal: 1 ms to 1 h, in whole milliseconds. One that is kept alive needs at least 100 ms, because
    /// a renewal goes out every third of it.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Whether the lease is renewed by itself as long as its guard lives.
    pub fn keep_alive(mut self, keep_alive: bool) -> Self {
        self.keep_alive = keep_alive;
        self
    }

    /// Whether an owner that holds this very lock gets it once more: the same lease with the same token, TTL and keep-alive, free when all its
    /// guards are gone. It needs an owner's name. The lock on a node of a run that the owner has locked (or the other way round) is refused all the same.
    pub fn reentrant(mut self, reentrant: bool) -> Self {
        self.reentrant = reentrant;
        self
    }

    /// As asked for, or this long.
    pub(crate) fn or_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = self.ttl.or(Some(ttl));
        self
    }

    /// Refuses a time to live that no lock which is kept alive can have.
    pub(crate) fn check_kept_ttl(what: &str, ttl: Duration) -> Result<(), InputError> {
        if (MIN_KEPT_ALIVE_TTL..=MAX_TTL).contains(&ttl) {
            return Ok(());
        }
        Err(InputError::new(format!("{what} {ttl:?}"), "it must be between 100 ms and 1 h; renewals cannot keep up with less"))
    }

    /// Refuses what [`acquire`](super::LeaseHandle::acquire) would refuse, before anything is asked for.
    pub(crate) fn checked(self) -> Result<Self, InputError> {
        self.clone().check()?;
        Ok(self)
    }

    pub(super) fn check(self) -> Result<Terms, InputError> {
        let ttl = self.ttl.unwrap_or(DEFAULT_TTL);
        check_text("lock owner", self.owner.as_deref())?;
        check_text("lock purpose", self.purpose.as_deref())?;
        let refuse = |why: &str| Err(InputError::new(format!("lock ttl {ttl:?}"), why));
        if !(MIN_TTL..=MAX_TTL).contains(&ttl) {
            return refuse("it must be between 1 ms and 1 h");
        }
        if self.keep_alive && ttl < MIN_KEPT_ALIVE_TTL {
            return refuse("renewals cannot keep up with it; take 100 ms or more, or keep_alive(false)");
        }
        if self.reentrant && self.owner.is_none() {
            return Err(InputError::new("lock option reentrant", "only an owner can enter again; name one with owner(…)"));
        }
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        Ok(Terms { owner: self.owner, purpose: self.purpose, ttl_ms, keep_alive: self.keep_alive, reentrant: self.reentrant })
    }
}

/// Options that were checked.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub(super) owner: Option<Arc<str>>,
    pub(super) purpose: Option<Arc<str>>,
    pub(super) ttl_ms: u64,
    pub(super) keep_alive: bool,
    pub(super) reentrant: bool,
}

fn check_text(what: &str, text: Option<&str>) -> Result<(), InputError> {
    let Some(text) = text else { return Ok(()) };
    let refuse = |why: String| Err(InputError::new(what, why));
    if text.is_empty() {
        return refuse("it is empty; leave it out instead".to_owned());
    }
    if text.len() > MAX_TEXT_BYTES {
        return refuse(format!("it has {} bytes, the limit is {MAX_TEXT_BYTES}", text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(c) => refuse(format!("it holds the control character {}; remove it", c.escape_unicode())),
        None => Ok(()),
    }
}
