//! A client that writes alone asks again right after its answer: a writer with a thread of its own stays awake for it.
//!
//! Only where that came true the last time, for a tenth of a millisecond, and behind everybody else who wants the processor: nobody pays for a client that
//! thinks between two writes, and nothing is held back.

use std::time::{Duration, Instant};

use super::spin::Spin;

/// How long a writer that answered a lone client listens for its next word without going to sleep.
const LISTEN: Duration = Duration::from_micros(100);

/// What a writer knows of a client that writes alone.
#[derive(Debug, Default)]
pub(super) struct Attention {
    /// When a single entry was answered.
    answered: Option<Instant>,
    spin: Spin,
}

impl Attention {
    pub(super) fn answered(&mut self, entries: usize) {
        self.answered = (entries == 1).then(Instant::now);
    }

    /// The next word: as soon as it can be heard, or from whoever sleeps until it comes.
    pub(super) fn listen<W, J>(
        &mut self,
        words: &mut W,
        hear: impl Fn(&mut W) -> Option<J>,
        sleep: impl FnOnce(&mut W) -> Option<J>,
    ) -> Option<J> {
        let Some(answered) = self.answered.take() else { return sleep(words) };
        let mut now = Instant::now();
        if self.spin.is_worth_it(now) {
            while now.saturating_duration_since(answered) < LISTEN {
                if let Some(word) = hear(words) {
                    return Some(word);
                }
                // Whoever wants to work may.
                std::thread::yield_now();
                let last = std::mem::replace(&mut now, Instant::now());
                if !self.spin.goes_on(now.saturating_duration_since(last), now) {
                    break;
                }
            }
        }
        let word = sleep(words);
        self.spin.heard(answered.elapsed() < 2 * LISTEN);
        word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a word that can be heard at once is listened for.
    fn listens(attention: &mut Attention) -> bool {
        attention.listen(&mut (), |()| Some(true), |()| Some(false)).unwrap()
    }

    #[test]
    fn a_writer_stays_awake_for_who_came_back_soon_and_alone() {
        let several = std::thread::available_parallelism().unwrap().get() > 1;
        let mut attention = Attention::default();
        assert!(!listens(&mut attention), "nobody was answered");
        attention.answered(1);
        assert!(!listens(&mut attention), "nobody came back yet");
        // The machine may stand still in between: then it was not soon.
        let again = |attention: &mut Attention| {
            attention.answered(1);
            listens(attention)
        };
        assert!((0..1000).any(|_| again(&mut attention)) || !several, "the last one came soon");
        attention.answered(2);
        assert!(!listens(&mut attention), "in company nobody waits for it");
        attention.answered(1);
        let slow = |(): &mut ()| {
            std::thread::sleep(4 * LISTEN);
            Some(false)
        };
        assert!(!attention.listen(&mut (), |()| None, slow).unwrap());
        assert!(!again(&mut attention), "who took his time is not waited for");
    }
}
