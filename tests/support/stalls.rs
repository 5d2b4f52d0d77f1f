//! What a busy machine does to those who need it now and then, and tests of leases that must not take that for the product's doing.
#![allow(dead_code, reason = "which tests there are depends on the features")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test fails by panicking, and says what it met")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Whoever was kept waiting for this part of a time may have missed it: a renewal has half of a TTL, and passes through some threads.
const PART: u32 = 8;

/// A thread of its own that writes and syncs a few bytes all the time, as whoever renews leases does now and then: it notes for how long it was kept waiting.
pub(crate) struct Witness(Arc<Mutex<Noted>>);

struct Noted {
    last: Instant,
    longest: Duration,
    ended: bool,
}

impl Witness {
    pub(crate) fn watch(folder: &Path) -> Self {
        let noted = Arc::new(Mutex::new(Noted { last: Instant::now(), longest: Duration::ZERO, ended: false }));
        let (folder, of_thread) = (TempDir::new_in(folder).unwrap(), Arc::clone(&noted));
        std::thread::spawn(move || {
            let file = std::fs::File::create(folder.path().join("witness")).unwrap();
            loop {
                std::os::unix::fs::FileExt::write_all_at(&file, b"here", 0).unwrap();
                file.sync_data().unwrap();
                let mut noted = of_thread.lock().unwrap();
                if noted.ended {
                    return;
                }
                noted.longest = noted.longest.max(noted.last.elapsed());
                noted.last = Instant::now();
                drop(noted);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self(noted)
    }

    /// Whether something took longer than this since `began`, though the machine kept nobody waiting for a good part of it meanwhile.
    pub(crate) fn saw_a_wait_of(&self, longest: Duration, began: Instant) -> bool {
        began.elapsed() > longest && self.longest() < longest / PART
    }

    /// What was before says nothing about what comes.
    pub(crate) fn forget(&self) {
        self.0.lock().unwrap().longest = Duration::ZERO;
    }

    /// Also if it is being kept waiting now.
    fn longest(&self) -> Duration {
        let noted = self.0.lock().unwrap();
        noted.longest.max(noted.last.elapsed())
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.0.lock().unwrap().ended = true;
    }
}

/// Tries a case with a lease of this TTL, which says what went wrong. That counts, unless the machine kept others waiting for a good part of the TTL
/// meanwhile: then the case says nothing, and is tried with one that is three times as long, twice at most.
pub(crate) async fn unless_it_stalls(folder: &Path, ttl: Duration, case: impl AsyncFn(Duration) -> Result<(), String>) {
    for ttl in [ttl, ttl * 3, ttl * 9] {
        let witness = Witness::watch(folder);
        let Err(why) = case(ttl).await else { return };
        let stalled = witness.longest();
        println!("TTL {ttl:?}: {why}; the machine kept others waiting for {stalled:?}");
        assert!(stalled >= ttl / PART, "TTL {ttl:?}: {why}, though the machine kept nobody waiting for more than {stalled:?}");
    }
    panic!("it did not go well with any TTL");
}
