//! The body of a request, given out in pieces: a large one may be long under way over a slow line, but once it was taken its size gives the answer no more time.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::sync::oneshot;

/// So many bytes of a request give it a second more: over a slow line they take it.
const BYTES_A_SECOND: usize = 64 * 1024;

/// What the size of a request gives it at most.
const LONGEST: Duration = Duration::from_secs(300);

/// What is given out at once. The connection takes up to sixteen of them before the first is written.
const PIECE: usize = 8 * 1024;

/// What the system is asked to keep of what is written and not sent yet; it takes twice as much.
pub(super) const SOCKET: usize = 128 * 1024;

/// What may be on this side when the last piece was taken.
const ON_THIS_SIDE: usize = 16 * PIECE + 2 * SOCKET;

/// A body.
pub(super) struct Piecemeal {
    rest: Bytes,
    taken: Option<oneshot::Sender<()>>,
}

/// How far a body is.
pub(super) struct Sending {
    bytes: usize,
    taken: oneshot::Receiver<()>,
}

impl Piecemeal {
    pub(super) fn new(bytes: Bytes) -> (Self, Sending) {
        let (told, taken) = oneshot::channel();
        let sending = Sending { bytes: bytes.len(), taken };
        (Self { rest: bytes, taken: Some(told) }, sending)
    }
}

impl Body for Piecemeal {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let most = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(most);
        if self.rest.is_empty()
            && let Some(taken) = self.taken.take()
        {
            let _nobody_waits = taken.send(()).is_err();
        }
        Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(u64::try_from(self.rest.len()).unwrap_or(u64::MAX))
    }
}

impl Sending {
    /// What answers; `None`: not `within` that time after the body was taken, or it was not taken in its own time.
    pub(super) async fn answered<T>(self, answer: impl Future<Output = T>, within: Duration) -> Option<T> {
        let mut answer = pin!(answer);
        let sent = tokio::time::timeout(within.saturating_add(time_to_send(self.bytes)), self.taken);
        tokio::select! {
            biased;
            answer = &mut answer => return Some(answer),
            // Given up with its body: the answer says so.
            taken = sent => { taken.ok()?.ok(); }
        }
        let within = within.saturating_add(time_to_send(self.bytes.min(ON_THIS_SIDE)));
        tokio::time::timeout(within, answer).await.ok()
    }
}

/// What so many bytes that are to be sent add to the time that there is.
fn time_to_send(bytes: usize) -> Duration {
    Duration::from_secs(u64::try_from(bytes / BYTES_A_SECOND).unwrap_or(u64::MAX)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_request_has_more_time() {
        assert_eq!(time_to_send(2_000), Duration::ZERO);
        assert_eq!(time_to_send(10 * BYTES_A_SECOND), Duration::from_secs(10));
        assert_eq!(time_to_send(usize::MAX), LONGEST);
    }
}
