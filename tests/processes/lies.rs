//! A backend that is slow, silent or wrong about what others commit hurts nobody who writes, and is found out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use seeknal_state::model::{Batch, Entry, Mutation, Outcome, RunPart};
use seeknal_state::{
    ChangeStream, Clock, Commit, Coordinator, Error, Event, NewRun, NodeId, NodeUpdate, RunId, StateBackend, SystemClock,
};

use tokio::task::JoinHandle;

use super::support::{Following, Lie, LyingBackend};
use super::{rows, until};

async fn open(backend: &Arc<LyingBackend>) -> Coordinator {
    let state = Coordinator::open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    state
}

/// What another process does.
async fn elsewhere(backend: &LyingBackend, row: u64) {
    let update = Box::new(NodeUpdate::running().row_count(row));
    elsewhere_by(backend, Mutation::SetNode { node: NodeId::new("n").unwrap(), update, at: SystemClock.now() }).await;
}

async fn elsewhere_by(backend: &LyingBackend, mutation: Mutation) {
    let run = RunId::new("r").unwrap();
    let now = backend.inner.load_run(&run).await.unwrap().unwrap();
    let part =
        RunPart { run, base: now.version(), expect: now.version(), guards: vec![], mutations: vec![mutation], after: None };
    let answer = backend.inner.commit(Arc::new(Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }]))).await.unwrap();
    assert!(matches!(answer.outcomes[0], Outcome::Applied(_)), "{answer:?}");
}

#[tokio::test]
async fn whoever_is_told_follows() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    for row in 1..=10 {
        elsewhere(&backend, row).await;
        backend.foreign.notify_one();
        until("the snapshot follows", async || rows(&state, "r", "n") == Some(row)).await;
    }
    state.close().await.unwrap();
}

/// A write that is in storage, and not told before the gate lets its answer through.
async fn own_write_on_its_way(backend: &LyingBackend, state: &Coordinator) -> JoinHandle<Result<Commit, Error>> {
    let run = RunId::new("r").unwrap();
    let before = state.snapshot("r").unwrap().version();
    backend.tell([Lie::AnswerLate]);
    let state = state.clone();
    let own = tokio::spawn(async move { state.set_node_state("r", "own", NodeUpdate::success()).await });
    until("it is in storage", async || backend.inner.run_version(&run).await.unwrap() == Some(before.next())).await;
    own
}

/// What others committed behind an own entry that is not told yet is loaded once it is: the entry itself does not meet it.
#[tokio::test(start_paused = true)]
async fn news_that_come_while_an_own_write_is_on_its_way_are_not_forgotten() {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    let own = own_write_on_its_way(&backend, &state).await;
    elsewhere(&backend, 7).await;
    let told = state.stats().follow_behind;
    backend.foreign.notify_one();
    until("the actor is told", async || state.stats().follow_behind > told).await;
    assert_eq!(rows(&state, "r", "n"), None, "not yet: the own write is on its way");
    backend.gate.add_permits(1);
    own.await.unwrap().unwrap();
    let began = tokio::time::Instant::now();
    until("the snapshot follows", async || rows(&state, "r", "n") == Some(7)).await;
    assert!(began.elapsed() < Duration::from_secs(3), "only because the versions are asked for now and then");
    state.close().await.unwrap();
}

/// Two may ask storage at once, and the actor hears of the later answer first.
#[tokio::test(start_paused = true)]
async fn older_news_do_not_hide_newer_ones() {
    for deleted in [false, true] {
        older_news_come_last(deleted).await;
    }
}

async fn older_news_come_last(deleted: bool) {
    let backend = LyingBackend::new(true);
    let state = open(&backend).await;
    state.create_run("s", NewRun::running()).await.unwrap();
    let own = own_write_on_its_way(&backend, &state).await;
    // Who reads both finds what the own write made of it, and is kept waiting with that.
    backend.late.store(true, Ordering::SeqCst);
    let waits = backend.loading.write().await;
    let loads = backend.loads.load(Ordering::SeqCst);
    let reading = tokio::spawn({
        let state = state.clone();
        async move { state.snapshots(&["r", "s"]).await }
    });
    until("it is read", async || backend.loads.load(Ordering::SeqCst) > loads).await;
    if deleted {
        elsewhere_by(&backend, Mutation::Delete { keep_coverage: false }).await;
    } else {
        elsewhere(&backend, 7).await;
    }
    let told = state.stats().follow_behind;
    backend.foreign.notify_one();
    until("the actor is told", async || state.stats().follow_behind > told).await;
    drop(waits);
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
    backend.gate.add_permits(1);
    own.await.unwrap().unwrap();
    reading.await.unwrap().unwrap();
    let began = tokio::time::Instant::now();
    let follows = || if deleted { state.snapshot("r").is_none() } else { rows(&state, "r", "n") == Some(7) };
    until("the snapshot follows", async || follows()).await;
    assert!(began.elapsed() < Duration::from_secs(3), "deleted {deleted}: only because the versions are asked for now and then");
    state.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_tells_nothing_is_asked_now_and_then() {
    let backend = LyingBackend::new(true);
    backend.follow(Following::Silent);
    let state = open(&backend).await;
    elsewhere(&backend, 7).await;
    let asked = tokio::time::Instant::now();
    while rows(&state, "r", "n") != Some(7) {
        assert!(asked.elapsed() < Duration::from_secs(30), "never asked");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    state.close().await.unwrap();
}

/// Own commits move the versions that storage has; nobody loads for that, however often he is told that others may have committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_commits_under_a_storm_of_news_make_nobody_load() {
    let backend = LyingBackend::new(true);
    backend.follow(Following::Storm);
    let state = open(&backend).await;
    let loads = backend.loads.load(Ordering::SeqCst);
    let rounds = state.stats().follow_rounds;
    let mut row = 0;
    while row < 200 || state.stats().follow_rounds < rounds + 20 {
        row += 1;
        state.set_node_state("r", "own", NodeUpdate::running().row_count(row)).await.unwrap();
        assert_eq!(rows(&state, "r", "own"), Some(row), "its own write is read at once");
    }
    assert_eq!(backend.loads.load(Ordering::SeqCst), loads, "{row} own writes");
    elsewhere(&backend, 1).await;
    until("the snapshot follows", async || rows(&state, "r", "n") == Some(1)).await;
    state.close().await.unwrap();
}

/// Gone beyond the TTL: writes and reads go on as far as they can, and health says that snapshots may be stale.
#[tokio::test(start_paused = true)]
async fn snapshots_of_a_storage_that_cannot_be_asked_are_marked_stale() {
    for lie in [Following::Failing, Following::Hanging] {
        let backend = LyingBackend::new(true);
        let state = Coordinator::builder()
            .lease_ttl(Duration::from_secs(20))
            .open(Arc::clone(&backend) as Arc<dyn StateBackend>)
            .await
            .unwrap();
        state.create_run("r", NewRun::running()).await.unwrap();
        backend.follow(lie);
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert!(state.health().freshness.stale_since.is_none(), "{lie:?}: not yet");
        state.set_node_state("r", "own", NodeUpdate::running().row_count(1)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(30)).await;
        let health = state.health();
        assert!(health.freshness.stale_since.is_some() && !health.is_sound(), "{lie:?}: {health:?}");
        assert!(health.freshness.age.unwrap() > Duration::from_secs(20));
        assert!(state.stats().follow_failures > 0);
        elsewhere(&backend, 9).await;
        backend.follow(Following::Honest);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(rows(&state, "r", "n"), Some(9), "{lie:?}: caught up without being told again");
        assert!(state.health().is_sound(), "{lie:?}: {:?}", state.health());
        state.close().await.unwrap();
    }
}

/// Where few runs have room, and so come and go.
async fn open_small(backend: &Arc<LyingBackend>) -> (Coordinator, ChangeStream) {
    let builder = Coordinator::builder().max_resident_runs(8).idle_after(Duration::from_millis(20));
    let state = builder.open(Arc::clone(backend) as Arc<dyn StateBackend>).await.unwrap();
    let changes = state.subscribe();
    rounds(&state, 2).await;
    (state, changes)
}

/// Waits until so many rounds of following have ended: of two the last began after this.
async fn rounds(state: &Coordinator, more: u64) {
    let before = state.stats().follow_rounds;
    until("others are followed", async || state.stats().follow_rounds >= before + more).await;
}

/// Makes so many runs here, each of which is told once.
async fn made_here(state: &Coordinator, changes: &mut ChangeStream, name: &str, runs: usize) {
    let names: Vec<String> = (0..runs).map(|number| format!("{name}_{number:05}")).collect();
    for some in names.chunks(100) {
        let mut tx = state.transaction();
        for run in some {
            tx.create_run(run.as_str(), NewRun::running());
        }
        tx.commit().await.unwrap();
        for run in some {
            let Ok(Event::Changed(change)) = changes.next().await else { panic!("{run} was made") };
            assert_eq!(change.run.as_str(), run, "{change:?}");
        }
    }
}

async fn nothing_more_is_told(changes: &mut ChangeStream) {
    let told = tokio::time::timeout(Duration::from_secs(1), changes.next()).await;
    assert!(told.is_err(), "{told:?} is told, and did not happen");
}

/// Nobody else commits, so nothing has to be looked for; what is remembered for subscribers is bounded all the same.
#[tokio::test(start_paused = true)]
async fn runs_that_come_and_go_here_are_not_remembered_for_ever() {
    const RUNS: usize = 20_000;
    let backend = LyingBackend::new(true);
    let (state, mut changes) = open_small(&backend).await;
    made_here(&state, &mut changes, "run", RUNS).await;
    until("they went to sleep", async || state.stats().resident_runs <= 8).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    // Somebody committed, nobody knows what: whatever is remembered is asked for.
    backend.asked.store(0, Ordering::SeqCst);
    backend.foreign.notify_one();
    rounds(&state, 1).await;
    let asked = backend.asked.load(Ordering::SeqCst);
    assert!(asked < RUNS * 2 / 3, "{asked} runs were asked for by name");
    nothing_more_is_told(&mut changes).await;
    state.close().await.unwrap();
}

/// What is made here while the newest are looked through is not among them, and is told once.
#[tokio::test(start_paused = true)]
async fn a_run_that_is_made_here_while_the_newest_are_looked_through_is_told_once() {
    let backend = LyingBackend::new(true);
    let (state, mut changes) = open_small(&backend).await;
    // More than are remembered closely.
    made_here(&state, &mut changes, "run", 5_000).await;
    until("they went to sleep", async || state.stats().resident_runs <= 8).await;
    rounds(&state, 2).await;
    let looks = backend.looks.load(Ordering::SeqCst);
    let looking = backend.looking.write().await;
    backend.foreign.notify_one();
    until("they are looked through", async || backend.looks.load(Ordering::SeqCst) > looks).await;
    made_here(&state, &mut changes, "then", 1).await;
    until("it went to sleep", async || state.stats().resident_runs == 0).await;
    drop(looking);
    rounds(&state, 1).await;
    backend.foreign.notify_one();
    let looks = backend.looks.load(Ordering::SeqCst);
    until("they are looked through again", async || backend.looks.load(Ordering::SeqCst) > looks).await;
    nothing_more_is_told(&mut changes).await;
    state.close().await.unwrap();
}
