//! Batches on runs that only one opening writes to go down in one way there and back; others are noticed all the same.

use std::sync::atomic::Ordering;

use seeknal_state::Coordinator;
use seeknal_state::model::{BatchAnswer, CommitSeq, Receipt};
use seeknal_state::store::MIGRATION;

use super::wire::{Odds, Wire};
use super::*;

/// More commits than it takes until nobody else is expected.
const ALONE: u64 = 12;

/// How the answers to the last batches are stored, newest first: by 2 what went down at once, by 1 what was read before.
fn ways(store: &Store, last: usize) -> String {
    store.sql(&format!(
        "SELECT string_agg(way, '' ORDER BY at DESC) FROM (SELECT get_byte(answers, 0)::text AS way, at FROM batches ORDER BY at DESC LIMIT {last}) AS b"
    ))
}

/// An opening behind a network that does nothing by itself.
async fn behind_a_wire(store: &Store) -> (Wire, Backend) {
    let wire = Wire::before(store.cluster.port, 1, Odds { commits: 0, others: 0 }).await;
    let options = networks::through(store.cluster, &wire, &store.schema);
    let backend = create_state_backend("database", &options).unwrap();
    backend.initialize().await.unwrap();
    (wire, backend)
}

/// Sends a batch that is kept on its way, and is not answered.
async fn lost(backend: &Backend, wire: &Wire, batch: &Arc<Batch>) {
    wire.deeds.hold.store(true, Ordering::Release);
    let error = backend.commit(Arc::clone(batch)).await.unwrap_err();
    assert!(error.is_unknown_outcome(), "{error}");
}

async fn alone(backend: &Backend, run: &str) {
    for rows in 0..ALONE {
        change(backend, run, vec![set("n", NodeUpdate::running().row_count(rows))]).await;
    }
}

fn on(tip: &RunState, node: &str, rows: u64) -> Batch {
    let update = vec![set(node, NodeUpdate::running().row_count(rows))];
    Batch::new(vec![entry(part_on(Some(tip), tip.version(), tip.id().as_str(), vec![], update))])
}

async fn sent(backend: &Backend, batch: Batch) -> Outcome {
    backend.commit(Arc::new(batch)).await.unwrap().outcomes.remove(0)
}

fn receipts(answer: &BatchAnswer) -> Vec<Receipt> {
    let receipt = |outcome: &'_ Outcome| applied(outcome.clone());
    answer.outcomes.iter().map(receipt).collect()
}

#[tokio::test]
async fn who_works_alone_needs_no_look_before() {
    let store = store!();
    let backend = store.open().await;
    change(&backend, "r", vec![create(0), Mutation::AddInterval { node: node_id("n"), interval: hours(0, 1) }]).await;
    alone(&backend, "r").await;
    assert_eq!(ways(&store, 2), "22");
    // Also a node that was not there, and one with all that a node may have.
    let full =
        NodeUpdate::failed("why").row_count(7).duration_ms(8).fingerprint("f").metadata("k", "v").depends_on([node_id("n")]);
    change(&backend, "r", vec![set("made", full), set("n", NodeUpdate::running().row_count(100))]).await;
    assert_eq!(ways(&store, 1), "2");
    // What has rows of its own in other tables is written as always.
    let more = vec![
        Mutation::AddInterval { node: node_id("n"), interval: hours(1, 2) },
        Mutation::AddPartition { node: node_id("new"), partition: PartitionKey::new("p").unwrap() },
    ];
    change(&backend, "r", more).await;
    assert_eq!(ways(&store, 1), "1");
    let state = load(&store.open().await, "r").await;
    assert_eq!(state.version(), load(&backend, "r").await.version());
    let node = state.node("n").unwrap();
    assert_eq!((node.row_count, node.intervals.iter().collect::<Vec<_>>()), (Some(100), vec![hours(0, 2)]));
    assert_eq!(state.node("made"), load(&backend, "r").await.node("made"));
    let made = state.node("made").unwrap();
    assert_eq!((made.error.as_deref(), made.duration_ms, made.depends_on.len()), (Some("why"), Some(8), 1));
    assert_eq!(state.node("new").unwrap().partitions.len(), 1);
    // What changes the run itself, or comes with a condition on a node, is decided on what is stored.
    change(&backend, "r", vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(1) }]).await;
    assert_eq!(ways(&store, 1), "1");
    alone(&backend, "r").await;
    assert_eq!(ways(&store, 1), "2");
    assert!(backend.verify().await.unwrap().is_sound());
}

#[tokio::test]
async fn numbers_that_are_drawn_on_the_way_grow_and_are_told_again() {
    let store = store!();
    let backend = store.open().await;
    for run in ["a", "b"] {
        change(&backend, run, vec![create(0)]).await;
        alone(&backend, run).await;
    }
    let mut last = CommitSeq(0);
    for _ in 0..3 {
        let (a, b) = (load(&backend, "a").await, load(&backend, "b").await);
        let several = vec![
            entry(part_on(Some(&a), a.version(), "a", vec![], vec![set("x", NodeUpdate::success())])),
            entry(part_on(Some(&b), b.version(), "b", vec![], vec![set("y", NodeUpdate::success())])),
        ];
        let batch = Arc::new(Batch::new(several));
        let answer = backend.commit(Arc::clone(&batch)).await.unwrap();
        assert_eq!(ways(&store, 1), "2");
        for receipt in receipts(&answer) {
            assert!(receipt.seq > last, "{answer:?}");
            last = receipt.seq;
        }
        // By the same opening, and by one that never heard of it.
        for again in [&backend, &store.open().await] {
            assert_eq!(again.commit(Arc::clone(&batch)).await.unwrap(), answer);
        }
        assert_eq!(load(&backend, "a").await.version(), a.version().next());
    }
}

#[tokio::test]
async fn others_are_noticed_before_anything_is_written() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0)]).await;
    alone(&one, "r").await;
    let known = load(&one, "r").await;
    change(&two, "r", vec![set("theirs", NodeUpdate::success().row_count(7))]).await;
    // A node that they did not touch: it is put behind what they wrote.
    let receipt = applied(sent(&one, on(&known, "n", 100)).await);
    assert_eq!((receipt.runs[0].before, receipt.runs[0].after), (known.version().next(), known.version().next().next()));
    assert_eq!(ways(&store, 1), "1");
    alone(&one, "r").await;
    assert_eq!(ways(&store, 1), "2");
    // And one that they did.
    let known = load(&one, "r").await;
    change(&two, "r", vec![set("n", NodeUpdate::success().row_count(8))]).await;
    let outcome = sent(&one, on(&known, "n", 200)).await;
    assert!(matches!(outcome, Outcome::Refused(Refusal::Stale { .. })), "{outcome:?}");
    // While both write, neither takes itself to be alone.
    for rows in 0..ALONE {
        change(&one, "r", vec![set("n", NodeUpdate::running().row_count(rows))]).await;
        change(&two, "r", vec![set("n", NodeUpdate::running().row_count(rows))]).await;
    }
    assert!(!ways(&store, 20).contains('2'));
    // Deleted and made again, it is another run under the name.
    alone(&one, "r").await;
    let known = load(&one, "r").await;
    change(&two, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
    let outcome = sent(&one, on(&known, "n", 300)).await;
    assert!(matches!(outcome, Outcome::Refused(Refusal::RunNotFound { .. })), "{outcome:?}");
    change(&two, "r", vec![create(1)]).await;
    let outcome = sent(&one, on(&known, "n", 400)).await;
    assert!(matches!(outcome, Outcome::Refused(Refusal::RunNotFound { .. })), "{outcome:?}");
    assert_eq!(load(&two, "r").await.node_count(), 0);
}

#[tokio::test]
async fn who_works_alone_is_kept_out_all_the_same() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0)]).await;
    alone(&one, "r").await;
    let known = load(&one, "r").await;
    let key = LeaseKey::run(run_id(MIGRATION));
    let token = lock(&two, &key, "mover", 60_000).await.unwrap();
    let outcome = sent(&one, on(&known, "n", 1)).await;
    assert!(matches!(outcome, Outcome::Refused(Refusal::LeaseHeld { .. })), "{outcome:?}");
    let release = Entry { leases: vec![LeaseMutation::Release { key, token }], ..Entry::default() };
    commit(&two, vec![release]).await;
    alone(&one, "r").await;
    store.sql("UPDATE meta SET schema_version = 99");
    let known = load(&one, "r").await;
    let error = one.commit(Arc::new(on(&known, "n", 2))).await.unwrap_err();
    assert_eq!((error.kind(), error.is_unknown_outcome()), (StoreErrorKind::NewerFormat, false), "{error}");
    assert_eq!(load(&one, "r").await.version(), known.version());
    store.sql("UPDATE meta SET schema_version = 2");
    alone(&one, "r").await;
    assert_eq!(ways(&store, 1), "2");
}

/// One run that another opening moved keeps the others of the batch from being written by the wrong numbers.
#[tokio::test]
async fn of_several_runs_one_that_moved_is_enough() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    let runs = ["a", "b", "c"];
    for run in runs {
        change(&one, run, vec![create(0)]).await;
        alone(&one, run).await;
    }
    for moved in runs {
        let mut tips = Vec::new();
        for run in runs {
            tips.push(load(&one, run).await);
        }
        change(&two, moved, vec![set("theirs", NodeUpdate::success())]).await;
        let entries = tips.iter().map(|tip| {
            entry(part_on(
                Some(tip),
                tip.version(),
                tip.id().as_str(),
                vec![],
                vec![set("n", NodeUpdate::success().row_count(1))],
            ))
        });
        let answer = commit(&one, entries.collect()).await;
        assert_eq!(ways(&store, 1), "1");
        for (receipt, tip) in receipts(&answer).iter().zip(&tips) {
            let before = if tip.id().as_str() == moved { tip.version().next() } else { tip.version() };
            assert_eq!((receipt.runs[0].before, receipt.runs[0].after), (before, before.next()));
            assert_eq!(load(&two, tip.id().as_str()).await.version(), before.next());
        }
        for run in runs {
            alone(&one, run).await;
        }
        assert_eq!(ways(&store, 1), "2");
    }
}

/// What the server refuses of a batch it has not begun.
#[tokio::test]
async fn a_value_that_the_server_does_not_take_leaves_nothing() {
    let store = store!();
    let backend = store.open().await;
    // Nothing in them repeats: the server stores what repeats shorter.
    let long = |salt: u64| -> String {
        (0..256).flat_map(|at| format!("{:04x}", (at * at * 40_503 + salt) % 65_521).into_bytes()).map(char::from).collect()
    };
    let (run, node) = (long(1), long(2));
    for run in [&*run, "r"] {
        change(&backend, run, vec![create(0)]).await;
        alone(&backend, run).await;
    }
    assert_eq!(ways(&store, 1), "2");
    let (heavy, light) = (load(&backend, &run).await, load(&backend, "r").await);
    store.sql("ALTER TABLE node_states ADD CONSTRAINT short CHECK (length(node_id) < 1000)");
    let part = |tip: &RunState, node: &str| {
        entry(part_on(Some(tip), tip.version(), tip.id().as_str(), vec![], vec![set(node, NodeUpdate::success())]))
    };
    let batch = Arc::new(Batch::new(vec![part(&light, "n"), part(&heavy, &node)]));
    for _ in 0..2 {
        // The second time it does not go at once: a run is not taken to be as it was left behind an error.
        let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
        assert!(!error.is_unknown_outcome() && error.to_string().contains("short"), "{error}");
        assert_eq!((load(&backend, &run).await, load(&backend, "r").await), (heavy.clone(), light.clone()));
    }
    store.sql("ALTER TABLE node_states DROP CONSTRAINT short");
    assert_eq!(receipts(&backend.commit(batch).await.unwrap()).len(), 2);
    assert!(load(&backend, &run).await.node(&node).is_some());
}

/// A sending that nobody has answered may begin whenever it likes: what is told of the batch meanwhile stays true.
#[tokio::test]
async fn a_sending_that_comes_late_changes_nothing_that_was_told() {
    let store = store!();
    let (wire, backend) = behind_a_wire(&store).await;
    change(&backend, "r", vec![create(0)]).await;
    for refused in [true, false] {
        alone(&backend, "r").await;
        let tip = load(&backend, "r").await;
        let batch = Arc::new(on(&tip, "n", 777));
        lost(&backend, &wire, &batch).await;
        if refused {
            store.sql("ALTER TABLE node_states ADD CONSTRAINT lucky CHECK (row_count <> 777)");
            let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
            assert!(error.is_never_applied() && error.to_string().contains("lucky"), "{error}");
            store.sql("ALTER TABLE node_states DROP CONSTRAINT lucky");
            // Whoever did not hear that asks again, and hears no other word.
            for again in [&backend, &store.open().await] {
                let error = again.commit(Arc::clone(&batch)).await.unwrap_err();
                assert!(error.is_never_applied() && error.is_retryable(), "{error}");
            }
        } else {
            assert_eq!(receipts(&backend.commit(Arc::clone(&batch)).await.unwrap())[0].runs[0].after, tip.version().next());
        }
        let told = load(&backend, "r").await;
        wire.deeds.go_on.notify_one();
        wire.deeds.arrived.notified().await;
        assert_eq!(load(&backend, "r").await, told, "it came later, and changed something");
        assert_eq!(told.node("n").unwrap().row_count == Some(777), !refused);
    }
    assert!(backend.verify().await.unwrap().is_sound());
}

/// The server's word that it waited in vain is certain, and has to come before this side has given it up.
#[tokio::test]
async fn a_run_that_somebody_holds_is_busy_and_no_more() {
    let store = store!();
    let (wire, backend) = behind_a_wire(&store).await;
    for run in ["alone", "shared"] {
        change(&backend, run, vec![create(0)]).await;
    }
    alone(&backend, "alone").await;
    let (one, other) = (on(&load(&backend, "alone").await, "n", 1), on(&load(&backend, "shared").await, "n", 1));
    wire.deeds.way.store(40, Ordering::Relaxed);
    let mut holder = store.cluster.session(&store.schema, "BEGIN; SELECT 1 FROM runs FOR UPDATE;");
    until("the rows are held", async || {
        store.sql("SELECT count(*) FROM pg_locks WHERE relation = 'runs'::regclass AND mode = 'RowShareLock'") != "0"
    })
    .await;
    // By either way, one beside the other.
    let (one, other) = tokio::join!(backend.commit(Arc::new(one)), backend.commit(Arc::new(other)));
    for error in [one.unwrap_err(), other.unwrap_err()] {
        assert!(error.is_retryable() && error.to_string().contains("seeknal state locks"), "{error}");
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
    for run in ["alone", "shared"] {
        change(&backend, run, vec![set("n", NodeUpdate::running().row_count(2))]).await;
    }
}

/// What may pass is tried again, but not under an id that was taken for good.
#[tokio::test]
async fn what_is_kept_out_is_not_tried_again() {
    let store = store!();
    let (wire, backend) = behind_a_wire(&store).await;
    change(&backend, "r", vec![create(0)]).await;
    alone(&backend, "r").await;
    let batch = Arc::new(on(&load(&backend, "r").await, "n", 777));
    lost(&backend, &wire, &batch).await;
    store.sql(
        "CREATE FUNCTION meets() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'it meets others' USING ERRCODE = '40001'; END $$; \
         CREATE TRIGGER meets BEFORE UPDATE ON node_states FOR EACH ROW WHEN (NEW.row_count = 777) EXECUTE FUNCTION meets()",
    );
    let error = backend.commit(Arc::clone(&batch)).await.unwrap_err();
    assert!(error.is_never_applied() && error.to_string().contains("it meets others"), "{error}");
    wire.deeds.go_on.notify_one();
    wire.deeds.arrived.notified().await;
    assert_ne!(load(&backend, "r").await.node("n").unwrap().row_count, Some(777));
}

/// Where one alone works, behind a network that loses, halves, delays and doubles what goes at once.
#[tokio::test]
async fn what_goes_at_once_through_a_lying_network_is_done_once() {
    let store = store!();
    let wire = Wire::before(store.cluster.port, 7, Odds { commits: 150, others: 0 }).await;
    let options = networks::through(store.cluster, &wire, &store.schema);
    let state = Coordinator::open(create_state_backend("database", &options).unwrap()).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut version = load(&store.open().await, "r").await.version();
    // Behind everything that was lost it takes some commits until nobody else is expected, and again most go the other way.
    let at_once = || store.sql("SELECT count(*) > 50 FROM batches WHERE get_byte(answers, 0) = 2") == "t";
    let mut rows = 0;
    while rows < 200 || !at_once() || !wire.deeds.undone().is_empty() {
        assert!(rows < 2_000, "hardly anything goes at once, or never: {:?}", wire.deeds.undone());
        for _ in 0..50 {
            let commit = state.set_node_state("r", "n", NodeUpdate::running().row_count(rows)).await.unwrap();
            // Nobody else writes: each is done once, and told in its place.
            assert_eq!((commit.runs[0].before, commit.runs[0].after), (version, version.next()));
            version = version.next();
            rows += 1;
        }
    }
    state.close().await.unwrap();
    let stored = load(&store.open().await, "r").await;
    assert_eq!((stored.version(), stored.node("n").unwrap().row_count), (version, Some(rows - 1)));
}

/// Nobody waits for a backend whose thread has ended.
#[tokio::test]
async fn a_backend_that_is_closed_under_its_writers_answers_all_of_them() {
    let store = store!();
    let backend = store.open().await;
    let state = Coordinator::builder().open(Arc::clone(&backend)).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..16 {
        let state = state.clone();
        writers.spawn(async move {
            let mut told = 0_u64;
            while state.set_node_state("r", format!("n{writer}"), NodeUpdate::running().row_count(told)).await.is_ok() {
                told += 1;
            }
            (writer, told)
        });
    }
    until("many commits", async || store.sql("SELECT version > created_version + 200 FROM runs") == "t").await;
    backend.close().await.unwrap();
    let all = tokio::time::timeout(Duration::from_secs(30), writers.join_all()).await.expect("somebody waits for ever");
    let stored = load(&store.open().await, "r").await;
    for (writer, told) in all {
        let rows = stored.node(&format!("n{writer}")).and_then(|node| node.row_count);
        // The one after the last that was told may be there too: nobody was told of it.
        assert!(told == 0 || rows == Some(told - 1) || rows == Some(told), "{writer}: told {told}, stored {rows:?}");
    }
    let _it_is_closed = tokio::time::timeout(Duration::from_secs(30), state.close()).await.expect("closing waits for ever");
}
