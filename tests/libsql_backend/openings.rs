//! Several openings of one server, as several processes would: nothing is lost, nothing is applied twice, leases exclude.

use std::sync::Arc;
use std::time::Duration;

use seeknal_state::model::{Batch, Clock, Entry, FencingToken, LeaseKey, LeaseMutation, SystemClock};
use seeknal_state::store::KnownOpenings;
use seeknal_state::{
    Coordinator, NewRun, NodeId, NodeState, NodeUpdate, RunId, RunQuery, RunUpdate, Snapshot, StateBackend, Version,
    create_state_backend,
};
use tokio::task::JoinSet;

use super::batches::{applied, at, commit, lock, run_id};
use super::sqld::Sqld;

async fn open(server: &Sqld) -> Coordinator {
    Coordinator::open(create_state_backend("database", &server.options()).unwrap()).await.unwrap()
}

fn rows(snapshot: &Snapshot, node: &str) -> u64 {
    snapshot.node(node).and_then(|state: &NodeState| state.row_count).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn counters_that_many_openings_raise_lose_nothing() {
    const OPENINGS: usize = 4;
    const RAISES: u64 = 25;
    let Some(server) = Sqld::start() else { return };
    let first = open(&server).await;
    first.create_run("run", NewRun::running()).await.unwrap();
    let mut raisers = JoinSet::new();
    for number in 0..OPENINGS {
        let state = open(&server).await;
        raisers.spawn(async move {
            let own = format!("of {number}");
            for _ in 0..RAISES {
                // Everybody's counter by reading first, and one's own, which nobody else touches.
                loop {
                    let raised = state
                        .transact(|view, tx| {
                            let before =
                                view.run("run")?.and_then(|run| run.node("all").and_then(|node| node.row_count)).unwrap_or(0);
                            tx.set_node_state("run", "all", NodeUpdate::running().row_count(before + 1));
                            Ok(())
                        })
                        .await;
                    match raised {
                        Ok(_) => break,
                        Err(error) => assert!(error.is_conflict() && !error.is_unknown_outcome(), "{error}"),
                    }
                }
                state.set_node_state("run", &*own, NodeUpdate::running()).await.unwrap();
            }
            state.close().await.unwrap();
        });
    }
    while let Some(done) = raisers.join_next().await {
        done.unwrap();
    }
    let last = open(&server).await;
    let found = last.get_run("run").await.unwrap().unwrap();
    assert_eq!(rows(&found, "all"), OPENINGS as u64 * RAISES);
    assert!(last.backend().verify().await.unwrap().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn different_nodes_of_one_run_are_no_conflict() {
    const WRITES: u64 = 60;
    let Some(server) = Sqld::start() else { return };
    let openings = [open(&server).await, open(&server).await];
    let created = openings[0].create_run("run", NewRun::running()).await.unwrap().version().0;
    let mut writers = JoinSet::new();
    for (number, state) in openings.iter().enumerate() {
        let state = state.clone();
        writers.spawn(async move {
            for round in 0..WRITES {
                let update = NodeUpdate::running().row_count(round);
                state.set_node_state("run", format!("of {number}"), update).await.unwrap();
            }
        });
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    let last = open(&server).await;
    let found = last.get_run("run").await.unwrap().unwrap();
    assert_eq!((rows(&found, "of 0"), rows(&found, "of 1")), (WRITES - 1, WRITES - 1));
    assert_eq!(found.version().0, created + 2 * WRITES, "every write is one version");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_lease_is_held_by_one_opening_at_a_time() {
    let Some(server) = Sqld::start() else { return };
    let (a, b) = (open(&server).await, open(&server).await);
    a.create_run("run", NewRun::running()).await.unwrap();
    let held = a.acquire_lock("run", Duration::from_secs(5)).await.unwrap().unwrap();
    assert!(b.acquire_lock("run", Duration::from_millis(200)).await.unwrap().is_none(), "two hold it");
    let token = held.token();
    held.release().await.unwrap();
    let next = b.acquire_lock("run", Duration::from_secs(10)).await.unwrap().unwrap();
    assert!(next.token() > token);
}

/// Whoever asks with SQL whether a lock is held need not know how the holder's clock goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn until_is_by_the_servers_clock() {
    let Some(server) = Sqld::start() else { return };
    let backend = create_state_backend("database", &server.options()).unwrap();
    backend.initialize().await.unwrap();
    let key = LeaseKey { run: run_id("a name"), node: None };
    // By a clock that stands at 1970.
    let token = lock(&backend, &key, "ann", 60_000).await.unwrap();
    let shown = || {
        let shown = "until = strftime('%Y-%m-%dT%H:%M:%f000Z', expires_ms / 1000.0, 'unixepoch') \
                     AND unixepoch(until) - unixepoch() BETWEEN 30 AND 90";
        server.sql(&format!("SELECT count(*) FROM locks WHERE {shown}")).contains(r#""value":"1""#)
    };
    assert!(shown(), "{}", server.sql("SELECT * FROM locks"));
    server.sql("UPDATE locks SET until = '1970-01-01T00:00:00.000000Z'");
    let leases = vec![LeaseMutation::Renew { key, token, at: at(0), ttl_ms: 60_000 }];
    applied(commit(&backend, vec![Entry { leases, ..Entry::default() }]).await.outcomes.remove(0));
    assert!(shown(), "{}", server.sql("SELECT * FROM locks"));
    let listed = backend.list_leases().await.unwrap().remove(0);
    assert!(listed.until > Clock::now(&SystemClock), "{listed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn others_are_noticed_and_own_commits_are_not() {
    let Some(server) = Sqld::start() else { return };
    let make = || create_state_backend("database", &server.options()).unwrap();
    let (a, b): (Arc<dyn StateBackend>, Arc<dyn StateBackend>) = (make(), make());
    a.initialize().await.unwrap();
    b.initialize().await.unwrap();
    let create = |run: &str| {
        let mutations = vec![seeknal_state::model::Mutation::Create {
            run: NewRun::running(),
            at: seeknal_state::model::time::from_micros(0).unwrap(),
        }];
        let part = seeknal_state::model::RunPart {
            run: seeknal_state::RunId::new(run).unwrap(),
            base: seeknal_state::Version::NONE,
            expect: seeknal_state::Version::NONE,
            guards: Vec::new(),
            mutations,
            after: None,
        };
        Arc::new(Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }]))
    };
    a.commit(create("own")).await.unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(400), a.others_committed()).await;
    assert!(quiet.is_err(), "its own commit is not somebody else's");
    b.commit(create("other")).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), a.others_committed()).await.expect("a foreign commit is noticed").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn transitions_in_flight_share_requests() {
    const CLIENTS: usize = 256;
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    for run in 0..10 {
        state.create_run(format!("run{run}"), NewRun::running()).await.unwrap();
    }
    let before = state.stats().batch_entries.count();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let state = state.clone();
        clients.spawn(async move {
            for round in 0..8_u64 {
                let (run, node) = (format!("run{}", client % 10), format!("n{client}"));
                state.set_node_state(run, node, NodeUpdate::running().row_count(round)).await.unwrap();
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    let batches = state.stats().batch_entries.count() - before;
    let share = CLIENTS as u64 * 8 / batches;
    assert!(share >= 50, "{share} transitions a request");
    assert!(server.sql("SELECT seq FROM meta").contains(&format!(r#""value":"{}""#, 10 + CLIENTS * 8)));
}

/// A server that was away heard of nobody: for whoever looks first everybody has been silent for as long as it was away.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_lives_is_not_taken_for_gone_because_the_server_was_away() {
    let Some(mut server) = Sqld::start() else { return };
    let two = open(&server).await;
    two.create_run("r", NewRun::running()).await.unwrap();
    let id = two.backend().process().unwrap().id;
    server.restart();
    server.sql("UPDATE openings SET seen_ms = unixepoch() * 1000 - 64000");

    let one = open(&server).await;
    let alive = async |silent: bool| {
        if silent {
            server.sql(&format!("UPDATE openings SET seen_ms = unixepoch() * 1000 - 64000 WHERE process = '{id}'"));
        }
        let all = one.backend().processes().await.unwrap();
        all.into_iter().find(|open| open.process.id == id).expect("it is listed").alive
    };
    assert_eq!(alive(true).await, None, "that nothing was heard of it proves nothing");
    assert!(one.resume_run("r").await.is_err(), "its run was taken from a process that lives");
    assert_eq!(alive(false).await, Some(true), "it is heard of again");
    assert_eq!(alive(true).await, None);
    assert!(one.abandoned_runs().await.unwrap().is_empty());
    assert_eq!(alive(false).await, Some(true));
    two.close().await.unwrap();
    assert_eq!(one.backend().processes().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_is_silent_while_the_server_answers_is_gone() {
    let Some(server) = Sqld::start() else { return };
    let (one, two) = (open(&server).await, open(&server).await);
    two.create_run("r", NewRun::running()).await.unwrap();
    let id = two.backend().process().unwrap().id;
    // As if it had died: it has closed, and its row is there again.
    server.sql("CREATE TABLE kept AS SELECT * FROM openings");
    two.close().await.unwrap();
    let dies = |seconds: u32| {
        server.sql("INSERT OR REPLACE INTO openings SELECT * FROM kept");
        server.sql(&format!("UPDATE openings SET seen_ms = unixepoch() * 1000 - {seconds}000 WHERE process = '{id}'"));
    };
    let alive = async || {
        let all = one.backend().processes().await.unwrap();
        all.into_iter().find(|open| open.process.id == id).expect("it is listed").alive
    };
    dies(40);
    assert_eq!(alive().await, None);
    assert!(one.abandoned_runs().await.unwrap().is_empty(), "it may have lost two words");
    dies(61);
    assert_eq!(alive().await, None, "nobody has watched it yet");
    assert_eq!(one.abandoned_runs().await.unwrap().len(), 1);
    assert_eq!(alive().await, Some(false));
    // Who was watched once is known.
    let again = tokio::time::timeout(Duration::from_secs(8), one.resume_run("r")).await;
    again.expect("it was watched once more").unwrap();
    dies(0);
    assert_eq!(alive().await, Some(true), "it was heard of after all");
}

#[tokio::test]
async fn tables_of_the_first_version_are_brought_forward() {
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    state.create_run("r", NewRun::running()).await.unwrap();
    state.close().await.unwrap();
    server.sql("DROP TABLE openings");
    server.sql("UPDATE seeknal_schema SET version = 1");
    let reader = create_state_backend("database", &server.options().read_only(true)).unwrap();
    reader.initialize().await.unwrap();
    assert!(reader.processes().await.unwrap().is_empty());
    assert_eq!(reader.known_openings(), KnownOpenings::Some, "that nobody is listed says nothing");
    assert!(reader.verify().await.unwrap().checked.contains(&"schema version 1".to_owned()));
    let state = open(&server).await;
    assert_eq!(reader.processes().await.unwrap().len(), 1);
    assert_eq!(reader.known_openings(), KnownOpenings::All);
    assert!(server.sql("SELECT version FROM seeknal_schema").contains(r#""value":"2""#));
    state.set_node_state("r", "n", NodeUpdate::running()).await.unwrap();
    assert_eq!(state.backend().processes().await.unwrap().len(), 1);

    // A backup of then, under who has it open: that is no newer one.
    server.sql("DROP TABLE openings");
    server.sql("UPDATE seeknal_schema SET version = 1");
    let error = state.set_node_state("r", "n", NodeUpdate::success()).await.unwrap_err().to_string();
    assert!(error.contains("open it anew") && !error.contains("newer"), "{error}");
    let anew = open(&server).await;
    anew.set_node_state("r", "n", NodeUpdate::success()).await.unwrap();
}

/// A server's answer has a limit of 10 MB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_too_large_for_one_answer_are_listed_all_the_same() {
    const RUNS: usize = 6;
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    for run in 0..RUNS {
        let wide = "x".repeat(4_500_000);
        state.create_run(format!("run {run}"), NewRun::running()).await.unwrap();
        state.update_run(format!("run {run}"), RunUpdate::new().metadata("wide", wide)).await.unwrap();
    }
    for limit in [1, 2, 3, 200] {
        let (mut found, mut query) = (Vec::new(), RunQuery::default().limit(limit));
        loop {
            let page = state.list_runs(&query).await.unwrap();
            found.extend(page.runs.into_iter().map(|run| run.run_id.to_string()));
            if page.next.is_none() {
                break;
            }
            query = query.after(page.next);
        }
        let newest_first: Vec<String> = (0..RUNS).rev().map(|run| format!("run {run}")).collect();
        assert_eq!(found, newest_first, "pages of {limit}");
    }
    state.close().await.unwrap();
}

/// Its counters are those of an older day: what is committed then is neither refused nor told to be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_state_was_brought_back_is_written_to_once() {
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    state.create_run("run", NewRun::running()).await.unwrap();
    state.create_run("gone", NewRun::running()).await.unwrap();
    let before = state.get_run("run").await.unwrap().unwrap();
    server.sql("UPDATE meta SET seq = seq - 1 WHERE id = 1");
    server.sql("DELETE FROM runs WHERE run_id = 'gone'");
    let commit = state.set_node_state("run", "n", NodeUpdate::running().row_count(1)).await.unwrap();
    let stored = state.fresh("run").await.unwrap().unwrap();
    assert_eq!((rows(&stored, "n"), stored.version()), (1, commit.version()), "applied once, and told so");
    assert!(commit.runs[0].before > before.version(), "beyond what may have been given out");
    state.close().await.unwrap();
}

/// A server that lost its last commits, as in a power cut: the version of a lost commit is given to no other content, and nobody goes on with what he knew of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lost_commits_gives_no_version_out_twice() {
    let Some(server) = Sqld::start() else { return };
    let (one, two) = (open(&server).await, open(&server).await);
    one.create_run("run", NewRun::running()).await.unwrap();
    for node in ["n", "m"] {
        one.set_node_state("run", node, NodeUpdate::running().row_count(0)).await.unwrap();
    }
    let tables = ["meta", "runs", "node_states"];
    for table in tables {
        server.sql(&format!("CREATE TABLE kept_{table} AS SELECT * FROM {table}"));
    }
    for (state, node) in [(&one, "n"), (&two, "m")] {
        state.set_node_state("run", node, NodeUpdate::success().row_count(1)).await.unwrap();
    }
    let lost = one.fresh("run").await.unwrap().unwrap();
    assert_eq!((rows(&lost, "n"), rows(&lost, "m")), (1, 1));
    for table in tables {
        server.sql(&format!("INSERT OR REPLACE INTO {table} SELECT * FROM kept_{table}"));
        server.sql(&format!("DROP TABLE kept_{table}"));
    }

    for rows in [2, 3] {
        two.set_node_state("run", "n", NodeUpdate::running().row_count(rows)).await.unwrap();
    }
    let mut guarded = one.transaction();
    guarded.expect_version("run", lost.version());
    guarded.set_node_state("run", "n", NodeUpdate::new().metadata("k", 1));
    let error = guarded.commit().await.unwrap_err();
    assert!(error.is_conflict(), "{error}");
    for state in [&one, &two] {
        let now = state.fresh("run").await.unwrap().unwrap();
        assert_eq!((rows(&now, "n"), rows(&now, "m")), (3, 0), "nothing of what is lost stays");
        assert!(now.version() > lost.version());
    }
    one.close().await.unwrap();
    two.close().await.unwrap();
}

/// Who has it open lives through both: he knows what was given out in between, whether the counters are behind his clock or ahead of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_backup_brought_back_twice_gives_no_token_out_twice() {
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    state.create_run("run", NewRun::running()).await.unwrap();
    for behind in [1_u64, 1 << 55] {
        server.sql(&format!("UPDATE meta SET seq = max(seq, {behind}), token = max(token, {behind})"));
        let mut last = None;
        let mut next = async || {
            let lease = state.acquire_lock("run", Duration::from_secs(10)).await.unwrap().unwrap();
            let given = (lease.token(), state.set_node_state("run", "n", NodeUpdate::running()).await.unwrap().version());
            lease.release().await.unwrap();
            assert!(
                last.is_none_or(|last: (FencingToken, Version)| given.0 > last.0 && given.1 > last.1),
                "{given:?} after {last:?}"
            );
            last = Some(given);
        };
        next().await;
        for table in ["meta", "runs", "node_states"] {
            server.sql(&format!("CREATE TABLE kept_{table} AS SELECT * FROM {table}"));
        }
        next().await;
        next().await;
        for _ in 0..2 {
            for table in ["meta", "runs", "node_states"] {
                server.sql(&format!("INSERT OR REPLACE INTO {table} SELECT * FROM kept_{table}"));
            }
            next().await;
            next().await;
        }
        let (token, version) = last.unwrap();
        assert!(token.0.max(version.0) < behind.max(1 << 53) + (1 << 40), "{token:?}, {version:?}: far from where numbers end");
        for table in ["meta", "runs", "node_states"] {
            server.sql(&format!("DROP TABLE kept_{table}"));
        }
    }
    state.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_is_too_large_for_the_server_fails_alone() {
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    state.create_run("big", NewRun::running()).await.unwrap();
    for run in 0..10 {
        state.create_run(format!("r{run}"), NewRun::running()).await.unwrap();
    }
    let (stop, told) = tokio::sync::watch::channel(false);
    let mut others = tokio::task::JoinSet::new();
    for run in 0..10 {
        let (state, told) = (state.clone(), told.clone());
        others.spawn(async move {
            let mut rows = 0;
            while !*told.borrow() {
                rows += 1;
                state.set_node_state(format!("r{run}"), "n", NodeUpdate::running().row_count(rows)).await.unwrap();
            }
            (run, rows)
        });
    }
    let large = NodeUpdate::failed("x".repeat(6_000_000));
    for _ in 0..3 {
        let error = state.set_node_state("big", "n", large.clone()).await.unwrap_err();
        assert!(error.to_string().contains("smaller") && !error.is_unknown_outcome(), "{error}");
    }
    stop.send_replace(true);
    while let Some(other) = others.join_next().await {
        let (run, rows) = other.unwrap();
        assert_eq!(state.get_node_state(format!("r{run}"), "n").await.unwrap().unwrap().row_count, Some(rows));
    }
    assert!(state.get_node_state("big", "n").await.unwrap().is_none());
    state.close().await.unwrap();
}

/// A value has a limit of 5 MB there, also the list of the rows that a transaction is decided on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_over_many_long_names_is_decided_and_written() {
    const NODES: usize = 3_000;
    let Some(server) = Sqld::start() else { return };
    let run = "r".repeat(1_000);
    let first = open(&server).await;
    first.create_run(&run, NewRun::running()).await.unwrap();
    first.close().await.unwrap();
    // An opening that knows nothing reads first.
    let state = open(&server).await;
    let mut tx = state.transaction();
    for node in 0..NODES {
        tx.set_node_state(&run, format!("{node:0>1000}"), NodeUpdate::running());
    }
    tx.commit().await.unwrap();
    assert_eq!(state.fresh(&run).await.unwrap().unwrap().node_count(), NODES);
    state.close().await.unwrap();
}

/// Who follows others asks for the versions of all runs that are in memory at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_of_many_runs_with_long_names_are_asked_for() {
    const RUNS: usize = 6_000;
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    state.create_run("run", NewRun::running()).await.unwrap();
    server.sql(&format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {RUNS}) \
         INSERT INTO runs (run_id, status, created_at, version, created_version, header_version) \
         SELECT printf('%01000d', i), status, created_at, i, i, i FROM n, runs WHERE run_id = 'run'"
    ));
    let runs: Vec<RunId> = (0..=RUNS).map(|run| RunId::new(format!("{run:0>1000}")).unwrap()).collect();
    let versions = state.backend().run_versions(&runs).await.unwrap();
    let expected = std::iter::once(None).chain((1..=RUNS as u64).map(|version| Some(Version(version))));
    assert!(versions.into_iter().eq(expected));
    state.close().await.unwrap();
}

/// A server's answer has a limit of 10 MB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_and_locks_too_large_for_one_answer_are_read_all_the_same() {
    const PARTITIONS: usize = 12_000;
    let Some(server) = Sqld::start() else { return };
    let state = open(&server).await;
    state.create_run("run", NewRun::running()).await.unwrap();
    state.set_node_state("run", "node", NodeUpdate::success()).await.unwrap();
    server.sql(&format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {PARTITIONS}) \
         INSERT INTO partitions (run_id, node_id, partition) SELECT 'run', 'node', printf('%01000d', i) FROM n"
    ));
    let (_, latest) = state.backend().latest_node(&NodeId::new("node").unwrap()).await.unwrap().unwrap();
    assert_eq!(latest.partitions.len(), PARTITIONS);
    assert_eq!(state.coverage("node").await.unwrap().partitions.len(), PARTITIONS);

    let held = state.acquire_lock("run", Duration::ZERO).await.unwrap().unwrap();
    for node in 0..3 {
        server.sql(&format!(
            "INSERT INTO locks SELECT run_id, 'n{node}', {node} - 9, owner, owner_host, owner_pid, owner_process, owner_started_at, \
             hex(zeroblob(2000000)), since, until, ttl_ms, expires_ms FROM locks WHERE node_id = ''"
        ));
    }
    server.sql("UPDATE locks SET token = token + 20");
    assert_eq!(state.backend().list_leases().await.unwrap().len(), 4);
    server.sql("DELETE FROM locks");
    drop(held);

    server.sql("INSERT INTO coverage_partitions (node_id, partition) SELECT node_id, partition FROM partitions");
    let (_, kept) = state.backend().retained().await.unwrap().remove(0);
    assert_eq!(kept.coverage.partitions.len(), PARTITIONS);
    assert_eq!(state.backend().node_ids().await.unwrap().len(), 1);
    state.close().await.unwrap();
}
