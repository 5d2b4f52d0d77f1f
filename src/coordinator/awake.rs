//! A client that writes alone waits awake for its answer, where it is storage with a thread of its own that answers.
//!
//! Only where the last answer came soon, and was soon followed by the next write: nobody pays for slow storage, for a client that thinks between two writes,
//! or for one of many. And behind everybody else: the worker is kept for a twentieth of a millisecond at a time, and between two looks whoever wants the
//! processor has it. What it costs beside: a runtime with several workers wakes another one at every turn, who finds nothing to do.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::persist::Watch;
use crate::run::{Sending, Sent};
use crate::store::spin::Spin;

/// How long a client waits awake at most, and how soon an answer comes that is waited for like this.
const SOON: Duration = Duration::from_micros(400);
/// What a client may do between an answer and its next write.
const PAUSE: Duration = Duration::from_micros(100);
/// How long it keeps its worker from other tasks.
const TURN: Duration = Duration::from_micros(50);

/// What is known of the clients that write alone.
#[derive(Debug, Default)]
pub(crate) struct Awake(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    spin: Spin,
    answered: Option<Instant>,
}

impl Known {
    /// Whether a client that asks now is waited for awake.
    fn is_worth_it(&self, asked: Instant) -> bool {
        self.answered.is_some_and(|at| asked.saturating_duration_since(at) < PAUSE) && self.spin.is_worth_it(asked)
    }
}

impl Awake {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the answer of a client that is alone.
    ///
    /// # Cancel safety
    /// As [`Sending`].
    pub(super) async fn wait(&self, mut sending: Sending, watch: Watch<'_>) -> Sent {
        let asked = Instant::now();
        let mut stays = self.known().is_worth_it(asked);
        let mut last = asked;
        let sent = loop {
            if !stays {
                break sending.await;
            }
            // First the actor, and whoever else waits for this worker. The answer wakes whoever waits in any case: the worker may be kept by others, or stand
            // still.
            let mut others = pin!(tokio::task::yield_now());
            let sent = poll_fn(|cx| match Pin::new(&mut sending).poll(cx) {
                Poll::Ready(sent) => Poll::Ready(Some(sent)),
                Poll::Pending => others.as_mut().poll(cx).map(|()| None),
            });
            if let Some(sent) = sent.await {
                break sent;
            }
            stays = self.looks(&watch, asked, &mut last);
        };
        let answered = Instant::now();
        let mut known = self.known();
        known.spin.heard(answered.saturating_duration_since(asked) < SOON);
        known.answered = Some(answered);
        sent
    }

    /// Looks for news as long as a turn takes; whether there is to be another one.
    fn looks(&self, watch: &Watch<'_>, asked: Instant, last: &mut Instant) -> bool {
        let turn = Instant::now();
        let mut now = turn;
        loop {
            let since = now.saturating_duration_since(std::mem::replace(last, now));
            if !self.known().spin.goes_on(since, now) {
                return false;
            }
            let is_over = watch.has_news() || now.saturating_duration_since(turn) >= TURN;
            // Also behind news, which may be another's.
            std::thread::yield_now();
            if is_over {
                return now.saturating_duration_since(asked) < SOON;
            }
            now = Instant::now();
        }
    }
}
