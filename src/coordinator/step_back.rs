//! Letting others go first.

use std::future::poll_fn;
use std::task::Poll;

/// Goes behind whatever else is ready, once.
///
/// Not `tokio::task::yield_now`: that counts on the worker on which it is polled, and whoever blocks one, by an executor of his own, would wait without end.
pub(super) async fn step_back() {
    let mut stepped = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut stepped, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
