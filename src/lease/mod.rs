//! stub
use crate::model::*; use crate::store::*; use std::sync::Arc; use std::time::Duration;
pub(crate) trait LeaseStoreDoor: Send + Sync + 'static {
    fn commit(&self, entry: Entry) -> BoxFuture<'_, Result<Receipt, DoorError>>;
    fn has_deferred(&self, run: &RunId) -> bool;
    fn flush_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<(), StoreError>>;
}
#[derive(Debug, Clone)]
pub(crate) enum DoorError { Refused(Refusal), Store(StoreError) }
#[derive(Debug, Clone, thiserror::Error)]
pub enum LeaseError { #[error("x")] NotFound{token: FencingToken}, #[error("y")] Closed }
#[derive(Debug)] pub struct Lease; impl Lease { pub fn fence(&self) -> Fence { loop {} } }
#[derive(Debug, Default)] pub struct LockOptions; impl LockOptions { pub fn new() -> Self { Self } }
#[derive(Debug)] pub enum LostReason {}
#[derive(Debug, Clone)] pub(crate) struct LeaseHandle;
impl LeaseHandle {
  pub(crate) async fn start(_b: Arc<dyn StateBackend>, _d: Arc<dyn LeaseStoreDoor>, _c: Arc<dyn Clock>, _p: ProcessInfo) -> Result<Self, LeaseError> { Ok(Self) }
  pub(crate) async fn acquire(&self, _k: LeaseKey, _o: LockOptions, _w: Duration) -> Result<Option<Lease>, LeaseError> { Ok(None) }
  pub(crate) async fn list(&self) -> Result<Vec<LeaseRecord>, StoreError> { Ok(vec![]) }
  pub(crate) async fn force_unlock(&self, token: FencingToken) -> Result<LeaseRecord, LeaseError> { Err(LeaseError::NotFound{token}) }
  pub(crate) fn free_run(&self, _r: &RunId) {}
  pub(crate) async fn close(&self) {}
}
