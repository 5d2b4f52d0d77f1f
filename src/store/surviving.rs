//! A panic of a backend's own code is a failure like another: somebody waits for an answer.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::{Context, Poll};

use super::{StoreError, StoreErrorKind};
use crate::model::RunId;

/// Does it, and answers with this error if it panics. Where the panic was is told by its hook.
pub(crate) async fn surviving<T>(
    work: impl Future<Output = Result<T, StoreError>>,
    panicked: impl Fn() -> StoreError,
) -> Result<T, StoreError> {
    let mut work = pin!(work);
    let poll = |context: &mut Context<'_>| {
        catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)))
            .unwrap_or_else(|_told_by_its_hook| Poll::Ready(Err(panicked())))
    };
    poll_fn(poll).await
}

/// What is told of a run whose load panicked.
pub(crate) fn load_panicked(run: &RunId) -> StoreError {
    StoreError::not_applied(StoreErrorKind::Io, format!("the backend's own code panicked while it loaded run {run:?}"))
}
