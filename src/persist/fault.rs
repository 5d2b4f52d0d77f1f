//! What storage said of flushes that failed, for who asks how it stands.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::store::StoreError;

/// The last fault, as long as nothing disproved it.
#[derive(Debug, Default)]
pub(super) struct Fault {
    words: Mutex<Option<String>>,
    /// Whether there is one: the flushes that succeed are many, and take no lock for it.
    is_set: AtomicBool,
}

impl Fault {
    pub(super) fn get(&self) -> Option<String> {
        if !self.is_set.load(Ordering::Acquire) {
            return None;
        }
        self.words.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, error: &StoreError) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        *words = Some(error.to_string());
        // Under the lock: lines set and clear the same one.
        self.is_set.store(true, Ordering::Release);
    }

    pub(super) fn clear(&self) {
        if self.is_set.load(Ordering::Acquire) {
            let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
            *words = None;
            self.is_set.store(false, Ordering::Release);
        }
    }
}
