//! What others commit is seen: in snapshots, by subscribers, by fresh reads.

use std::time::Duration;

use seeknal_state::{ChangeStream, Coordinator, Event, NewRun, NodeId, NodeUpdate, OnDelete, RunUpdate, Version};

use super::peer::Peer;
use super::support::Store;
use super::{median, rows, until};

on_every_database!(
    snapshots_and_subscribers_follow_another_coordinator,
    another_process_is_followed_too,
    a_fresh_read_sees_at_once_what_was_acknowledged_elsewhere,
    runs_that_others_delete_and_make_again_are_seen,
    a_subscriber_hears_of_runs_that_nobody_here_asked_for,
    a_subscriber_hears_of_every_run_however_few_may_be_resident,
    a_subscriber_hears_once_of_what_is_read_here_first,
    after_every_burst_of_both_both_show_the_same,
    an_own_commit_does_not_hide_the_one_before_it,
);

/// How far behind it usually may be: on one machine a tenth of a second, on servers as much as a busy machine may add to that.
fn typical(store: &Store) -> Duration {
    Duration::from_millis(if store.is_local() { 100 } else { 500 })
}

/// The next event that is what is waited for.
async fn event(
    changes: &mut ChangeStream,
    wanted: impl Fn(&seeknal_state::Change) -> bool,
) -> std::sync::Arc<seeknal_state::Change> {
    let found = async {
        loop {
            match changes.next().await.unwrap() {
                Event::Changed(change) if wanted(&change) => return change,
                _ => {}
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.expect("it is never told")
}

async fn snapshots_and_subscribers_follow_another_coordinator(store: Store) {
    let (here, there) = (store.open().await, store.open().await);
    there.create_run("r", NewRun::running()).await.unwrap();
    assert!(here.get_run("r").await.unwrap().is_some(), "resident from now on");
    let mut changes = here.subscribe();
    let mut lags = Vec::new();
    for row in 1..=31 {
        let commit = there.set_node_state("r", "n", NodeUpdate::running().row_count(row)).await.unwrap();
        lags.push(until("the snapshot follows", async || rows(&here, "r", "n") == Some(row)).await);
        let change = event(&mut changes, |change| change.after == commit.version()).await;
        assert!(change.before < change.after && change.seq.is_none() && !change.deleted, "{change:?}");
        assert_eq!(change.nodes.iter().map(NodeId::as_str).collect::<Vec<_>>(), ["n"]);
        assert!(!change.header, "the run's own fields did not change");
        assert_eq!(change.snapshot.as_ref().unwrap().node("n").unwrap().row_count, Some(row));
    }
    println!("lag behind another coordinator: median {:.1?}, longest {:.1?}", median(lags.clone()), lags.iter().max().unwrap());
    assert!(median(lags) < typical(&store));
    there.update_run("r", RunUpdate::success()).await.unwrap();
    assert!(event(&mut changes, |change| change.header).await.nodes.is_empty());
    assert!(here.health().is_sound() && here.health().freshness.followed_at.is_some());
    here.close().await.unwrap();
    there.close().await.unwrap();
}

async fn another_process_is_followed_too(store: Store) {
    let here = store.open().await;
    here.create_run("r", NewRun::running()).await.unwrap();
    let mut peer = Peer::start(&store.place);
    assert_eq!(peer.ask("write r n 50"), "written");
    until("the snapshot follows", async || rows(&here, "r", "n") == Some(50)).await;
    let mut lags = Vec::new();
    for row in 51..=81 {
        assert_eq!(peer.ask(&format!("row r n {row}")), "written");
        lags.push(until("the snapshot follows", async || rows(&here, "r", "n") == Some(row)).await);
    }
    println!("lag behind another process: median {:.1?}, longest {:.1?}", median(lags.clone()), lags.iter().max().unwrap());
    assert!(median(lags) < typical(&store));
    // And what is written here on top of it is not refused.
    let commit = here.set_node_state("r", "m", NodeUpdate::success()).await.unwrap();
    assert_eq!(here.snapshot("r").unwrap().version(), commit.version());
    here.close().await.unwrap();
}

async fn a_fresh_read_sees_at_once_what_was_acknowledged_elsewhere(store: Store) {
    let (here, there) = (store.open().await, store.open().await);
    there.create_run("r", NewRun::running()).await.unwrap();
    here.get_run("r").await.unwrap();
    let mut behind = 0;
    for row in 1..=50 {
        there.set_node_state("r", "n", NodeUpdate::running().row_count(row)).await.unwrap();
        behind += u32::from(rows(&here, "r", "n") != Some(row));
        let fresh = here.fresh("r").await.unwrap().unwrap();
        assert_eq!(fresh.node("n").unwrap().row_count, Some(row));
        assert_eq!(rows(&here, "r", "n"), Some(row), "the snapshot was brought up to date with it");
        // It waits for what is on its way here, and has it.
        here.set_node_state("r", "own", NodeUpdate::running().row_count(row)).await.unwrap();
        assert_eq!(here.fresh("r").await.unwrap().unwrap().node("own").unwrap().row_count, Some(row));
    }
    assert!(behind > 0, "every snapshot was up to date by itself: this shows nothing");
    assert!(here.fresh("nobody").await.unwrap().is_none());
    there.delete_run("r", OnDelete::KeepCoverage).await.unwrap();
    assert!(here.fresh("r").await.unwrap().is_none());
    there.create_run("r", NewRun::running()).await.unwrap();
    assert_eq!(here.fresh("r").await.unwrap().unwrap().node_count(), 0);
    here.close().await.unwrap();
    there.close().await.unwrap();
}

async fn runs_that_others_delete_and_make_again_are_seen(store: Store) {
    let (here, there) = (store.open().await, store.open().await);
    there.create_run("r", NewRun::running()).await.unwrap();
    there.set_node_state("r", "old", NodeUpdate::success()).await.unwrap();
    let before = here.get_run("r").await.unwrap().unwrap();
    let mut changes = here.subscribe();
    there.delete_run("r", OnDelete::KeepCoverage).await.unwrap();
    until("the deletion is seen", async || here.snapshot("r").is_none()).await;
    let gone = event(&mut changes, |change| change.deleted).await;
    assert!(gone.snapshot.is_none() && gone.nodes.iter().any(|node| node.as_str() == "old"), "{gone:?}");
    there.create_run("r", NewRun::running()).await.unwrap();
    until("the new run is seen", async || here.snapshot("r").is_some_and(|run| run.node_count() == 0)).await;
    let after = here.get_run("r").await.unwrap().unwrap();
    assert!(after.created_version() > before.version(), "its versions are new");
    assert!(event(&mut changes, |change| change.after == after.version()).await.snapshot.is_some());
    here.close().await.unwrap();
    there.close().await.unwrap();
}

async fn a_subscriber_hears_of_runs_that_nobody_here_asked_for(store: Store) {
    let there = store.open().await;
    there.create_run("known", NewRun::running()).await.unwrap();
    let here = store.open().await;
    let mut changes = here.subscribe();
    let listening = here.stats().follow_rounds;
    // A round that was under way began before anybody listened.
    until("the newest runs were looked through", async || here.stats().follow_rounds > listening + 1).await;
    there.create_run("new", NewRun::running()).await.unwrap();
    let made = event(&mut changes, |change| change.run.as_str() == "new").await;
    assert!(made.snapshot.is_some() && made.header);
    let commit = there.set_node_state("known", "n", NodeUpdate::success()).await.unwrap();
    // That it was created may be told as well, to who is open by then.
    let moved = event(&mut changes, |change| change.run.as_str() == "known" && change.before != Version::NONE).await;
    assert_eq!((moved.before.next(), moved.after), (commit.version(), commit.version()), "the net change, from what was known");
    assert_eq!(moved.nodes.iter().map(NodeId::as_str).collect::<Vec<_>>(), ["n"]);
    there.delete_run("new", OnDelete::KeepCoverage).await.unwrap();
    assert!(event(&mut changes, |change| change.run.as_str() == "new").await.deleted);
    here.close().await.unwrap();
    there.close().await.unwrap();
}

/// Also of old ones among many, of deleted ones, and of more than there is room for at a time.
async fn a_subscriber_hears_of_every_run_however_few_may_be_resident(store: Store) {
    let builder = Coordinator::builder().max_resident_runs(8).idle_after(Duration::from_millis(20));
    let (here, there) = (builder.open(store.backend()).await.unwrap(), store.open().await);
    let run = |number: usize| format!("run_{number:03}");
    let mut changes = here.subscribe();
    let listening = here.stats().follow_rounds;
    // A round that was under way began before anybody listened.
    until("the runs were looked through", async || here.stats().follow_rounds > listening + 1).await;
    let mut tx = there.transaction();
    for number in 0..90 {
        tx.create_run(run(number).as_str(), NewRun::running());
    }
    tx.commit().await.unwrap();
    let mut created: std::collections::BTreeSet<String> = (0..90).map(run).collect();
    while !created.is_empty() {
        let change = event(&mut changes, |_| true).await;
        assert!(created.remove(change.run.as_str()), "{change:?} is told, and did not happen");
        assert_eq!((change.before, change.after, change.header), (Version::NONE, Version::NONE.next(), true));
    }
    let changed: Vec<usize> = (0..90).step_by(3).collect();
    let mut expected = std::collections::BTreeMap::new();
    for number in &changed {
        let commit = there.set_node_state(run(*number).as_str(), "n", NodeUpdate::success()).await.unwrap();
        expected.insert(run(*number), commit.version());
    }
    there.delete_run(run(1).as_str(), OnDelete::KeepCoverage).await.unwrap();
    let mut deleted = false;
    while !expected.is_empty() || !deleted {
        let change = event(&mut changes, |_| true).await;
        if change.run.as_str() == run(1) {
            assert!(change.deleted, "{change:?}");
            deleted = true;
            continue;
        }
        let version = expected.remove(change.run.as_str()).unwrap_or_else(|| panic!("{change:?} is told, and did not happen"));
        assert_eq!((change.before.next(), change.after), (version, version), "the net change, from what was known");
        assert_eq!(change.nodes.iter().map(NodeId::as_str).collect::<Vec<_>>(), ["n"]);
    }
    here.close().await.unwrap();
    there.close().await.unwrap();
}

/// Who reads a run here before it was heard of that others changed it does not take the change from subscribers; what they were told they are not told again.
async fn a_subscriber_hears_once_of_what_is_read_here_first(store: Store) {
    let builder = Coordinator::builder().idle_after(Duration::from_millis(20));
    let (there, witness) = (store.open().await, store.open().await);
    let run = |number: usize| format!("run_{number:03}");
    let mut tx = there.transaction();
    for number in 0..80 {
        tx.create_run(run(number).as_str(), NewRun::running());
    }
    tx.create_run("mark", NewRun::running());
    tx.commit().await.unwrap();
    // Who is open while others are told that they were created may be told so as well: here it is opened after that.
    witness.get_run("mark").await.unwrap();
    there.set_node_state("mark", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    until("it was told", async || rows(&witness, "mark", "n") == Some(1)).await;
    witness.close().await.unwrap();
    let here = builder.open(store.backend()).await.unwrap();
    let mut changes = here.subscribe();
    let listening = here.stats().follow_rounds;
    // A round that was under way began before anybody listened.
    until("the runs were looked through", async || here.stats().follow_rounds > listening + 1).await;
    for row in 1..=5 {
        let commit = there.set_node_state(run(0).as_str(), "n", NodeUpdate::running().row_count(row)).await.unwrap();
        let read = here.fresh(run(0).as_str()).await.unwrap().unwrap();
        assert_eq!(read.node("n").unwrap().row_count, Some(row));
        let change = event(&mut changes, |_| true).await;
        assert_eq!(
            (change.run.as_str(), change.before.next(), change.after),
            (run(0).as_str(), commit.version(), commit.version())
        );
    }
    here.delete_run(run(1).as_str(), OnDelete::KeepCoverage).await.unwrap();
    assert!(event(&mut changes, |_| true).await.deleted);
    assert!(here.get_run(run(1).as_str()).await.unwrap().is_none());
    for number in [2, 3, 2, 3] {
        until("it sleeps", async || here.stats().resident_runs == 0).await; // to ask for the run would wake it
        there.set_node_state(run(number).as_str(), "n", NodeUpdate::success()).await.unwrap();
        let change = event(&mut changes, |_| true).await;
        assert_eq!(change.run.as_str(), run(number), "nothing is told twice: {change:?}");
    }
    here.close().await.unwrap();
    there.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_replaced_is_noticed_by_who_reads() {
    let store = Store::of("database");
    let here = store.open().await;
    here.create_run("r", NewRun::running()).await.unwrap();
    let db = store.folder.path().join("state.db");
    std::fs::rename(&db, db.with_extension("away")).unwrap();
    let error = here.fresh("r").await.unwrap_err().to_string();
    assert!(error.contains("renamed, removed or replaced"), "{error}");
    until("health tells", async || here.health().freshness.error.is_some_and(|error| error.contains("replaced"))).await;
    std::fs::rename(db.with_extension("away"), &db).unwrap();
    assert!(here.fresh("r").await.unwrap().is_some(), "put back it is what it was");
    until("health tells", async || here.health().freshness.error.is_none()).await;
    here.close().await.unwrap();
}

/// Nothing is missed: whenever both fall silent, both show the same. Sooner than the versions would be asked for without a hint.
async fn after_every_burst_of_both_both_show_the_same(store: Store) {
    let (here, there) = (store.open().await, store.open().await);
    here.create_run("r", NewRun::running()).await.unwrap();
    there.get_run("r").await.unwrap();
    for round in 1..=if store.is_local() { 40_u64 } else { 20 } {
        let burst = |state: seeknal_state::Coordinator, node: &'static str, writes: u64| async move {
            for write in 0..writes {
                state.set_node_state("r", node, NodeUpdate::running().row_count(round * 1000 + write)).await.unwrap();
            }
        };
        // Uneven, so that each of them is the last one to write in some rounds, with and without the other one on its way.
        let bursts = [
            tokio::spawn(burst(here.clone(), "h", round % 7)),
            tokio::spawn(burst(there.clone(), "t", (round * 3) % 5)),
            tokio::spawn(burst(here.clone(), "both", round % 3)),
            tokio::spawn(burst(there.clone(), "both", round % 2)),
        ];
        for burst in bursts {
            burst.await.unwrap();
        }
        let stored = here.backend().run_version(&seeknal_state::RunId::new("r").unwrap()).await.unwrap().unwrap();
        let same = async {
            while [&here, &there].iter().any(|state| state.snapshot("r").is_none_or(|run| run.version() != stored)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(3), same).await;
        assert!(
            in_time.is_ok(),
            "round {round}: a commit was missed: {stored}, {:?}",
            here.snapshot("r").map(|run| run.version())
        );
        assert_eq!(here.snapshot("r").unwrap().state(), there.snapshot("r").unwrap().state(), "round {round}");
    }
    here.close().await.unwrap();
    there.close().await.unwrap();
}

/// A commit of this process right behind one of others does not hide it, also where it is on another run and so does not meet it.
async fn an_own_commit_does_not_hide_the_one_before_it(store: Store) {
    let (here, there) = (store.open().await, store.open().await);
    for run in ["r", "own"] {
        here.create_run(run, NewRun::running()).await.unwrap();
    }
    for row in 1..=20 {
        there.set_node_state("r", "n", NodeUpdate::running().row_count(row)).await.unwrap();
        here.set_node_state("own", "n", NodeUpdate::running().row_count(row)).await.unwrap();
        let took = until("the snapshot follows", async || rows(&here, "r", "n") == Some(row)).await;
        assert!(took < Duration::from_secs(3), "only because the versions are asked for now and then");
    }
    here.close().await.unwrap();
    there.close().await.unwrap();
}

/// Following costs nothing while nobody else writes: own commits are told apart without asking for a version.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_commits_are_no_news() {
    let store = Store::of("database");
    let state = store.open().await;
    state.create_run("r", NewRun::running()).await.unwrap();
    let (before, began) = (state.stats(), std::time::Instant::now());
    for row in 1..=500 {
        state.set_node_state("r", "n", NodeUpdate::running().row_count(row)).await.unwrap();
    }
    // Without news the versions are asked for every five seconds.
    let unasked = began.elapsed().as_secs() / 5 + 1;
    let rounds = state.stats().follow_rounds - before.follow_rounds;
    assert!(rounds <= unasked, "{rounds} rounds in {:?}", began.elapsed());
    state.close().await.unwrap();
}
