//! Leases as rows on the server's clock: exclusion between openings, expiry, fences, tokens that never go back.

use super::*;

fn write(fence: Fence, tip: &RunState) -> Entry {
    let part = part_on(Some(tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::new())]);
    Entry { parts: vec![part], fences: vec![fence], ..Entry::default() }
}

#[tokio::test]
async fn leases_exclude_expire_and_fence() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0)]).await;
    let (run, node) = (LeaseKey::run(run_id("r")), LeaseKey::node(run_id("r"), node_id("n")));
    let token = lock(&one, &run, "a", 60_000).await.unwrap();
    for key in [&run, &node] {
        match lock(&two, key, "b", 60_000).await.unwrap_err() {
            Refusal::LeaseHeld { holder } => assert_eq!((holder.token, &*holder.owner.name), (token, "a")),
            other => panic!("{other}"),
        }
    }
    let listed = two.list_leases().await.unwrap();
    assert_eq!((listed.len(), listed[0].token, listed[0].purpose.as_deref()), (1, token, Some("test")));
    let fence = |token| Fence { key: LeaseKey::run(run_id("r")), token };
    let tip = load(&one, "r").await;
    let wrong = commit(&one, vec![write(fence(FencingToken(token.0 + 1)), &tip)]).await.outcomes.remove(0);
    assert!(matches!(refused(wrong), Refusal::Fenced { .. }));
    applied(commit(&one, vec![write(fence(token), &tip)]).await.outcomes.remove(0));

    // Taken away by somebody else: the holder's writes are refused.
    let force = |token| Entry { leases: vec![LeaseMutation::Force { token }], ..Entry::default() };
    assert!(matches!(
        refused(commit(&two, vec![force(FencingToken(999_999))]).await.outcomes.remove(0)),
        Refusal::LeaseGone { .. }
    ));
    applied(commit(&two, vec![force(token)]).await.outcomes.remove(0));
    let tip = load(&one, "r").await;
    assert!(matches!(refused(commit(&one, vec![write(fence(token), &tip)]).await.outcomes.remove(0)), Refusal::Fenced { .. }));

    // By the server's clock, with nobody's help.
    let brief = lock(&one, &node, "a", 50).await.unwrap();
    let mut next = None;
    until("the lease of 50 ms is over", async || {
        next = lock(&two, &run, "b", u64::MAX).await.ok();
        next.is_some()
    })
    .await;
    assert!(next.unwrap() > brief && brief > token);
    assert_eq!(one.list_leases().await.unwrap().len(), 1);
    let renew = LeaseMutation::Renew { key: node, token: brief, at: at(1), ttl_ms: 60_000 };
    let renewed = commit(&one, vec![Entry { leases: vec![renew], ..Entry::default() }]).await.outcomes.remove(0);
    assert!(matches!(refused(renewed), Refusal::LeaseGone { .. }));
}

#[tokio::test]
async fn of_many_who_want_a_run_or_its_nodes_at_once_one_is_granted() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    for round in 0..15 {
        // Nobody ever made this run: there is no row that could be locked.
        let run = format!("r{round}");
        let want = |backend: &Backend, key: LeaseKey| {
            let backend = Arc::clone(backend);
            tokio::spawn(async move { lock(&backend, &key, "me", 60_000).await })
        };
        let (whole, node) = (LeaseKey::run(run_id(&run)), LeaseKey::node(run_id(&run), node_id("n")));
        let tries = [want(&one, whole.clone()), want(&two, whole), want(&one, node.clone()), want(&two, node)];
        let mut granted = 0;
        for grant in tries {
            granted += usize::from(grant.await.unwrap().is_ok());
        }
        assert_eq!(granted, 1, "{run}");
    }
}

#[tokio::test]
async fn a_fenced_write_and_a_takeover_never_both_win() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    change(&one, "r", vec![create(0)]).await;
    for _ in 0..10 {
        let key = LeaseKey::run(run_id("r"));
        let token = lock(&one, &key, "a", 60_000).await.unwrap();
        let tip = load(&one, "r").await;
        let take = Entry {
            leases: vec![
                LeaseMutation::Force { token },
                LeaseMutation::Grant { key: key.clone(), owner: owner("b"), purpose: None, at: at(0), ttl_ms: 60_000 },
            ],
            ..Entry::default()
        };
        let (written, taken) =
            tokio::join!(commit(&one, vec![write(Fence { key: key.clone(), token }, &tip)]), commit(&two, vec![take]));
        let taken = applied(taken.outcomes.into_iter().next().unwrap());
        match written.outcomes.into_iter().next().unwrap() {
            // Before the takeover, or not at all.
            Outcome::Applied(receipt) => assert!(receipt.runs[0].after > tip.version()),
            Outcome::Refused(refusal) => assert!(matches!(refusal, Refusal::Fenced { .. }), "{refusal}"),
        }
        let release = LeaseMutation::Release { key, token: taken.grants[0].token };
        commit(&two, vec![Entry { leases: vec![release], ..Entry::default() }]).await;
    }
}

#[tokio::test]
async fn numbers_go_on_over_a_restored_copy() {
    let store = store!();
    let key = LeaseKey::run(run_id("r"));
    let backend = store.open().await;
    change(&backend, "first", vec![create(0)]).await;
    backend.close().await.unwrap();
    let copy = format!("copy_{}", store.schema);
    store.cluster.copy("tests", &store.schema, &copy);
    // What the copy does not know of.
    let backend = store.open().await;
    let token = lock(&backend, &key, "a", 1).await.unwrap();
    let receipt = change(&backend, "second", vec![create(0)]).await;
    backend.close().await.unwrap();

    let url = store.cluster.url("").replace("/tests", &format!("/{copy}"));
    let restored = create_state_backend("database", &store.options().database_url(url)).unwrap();
    let report = restored.initialize().await.unwrap();
    assert!(report.notices.iter().any(|notice| notice.contains("copy of the database")), "{report:?}");
    assert!(lock(&restored, &key, "a", 60_000).await.unwrap() > token);
    let again = change(&restored, "second", vec![create(0)]).await;
    assert!(again.seq > receipt.seq && again.runs[0].after > receipt.runs[0].after);
    restored.close().await.unwrap();
    let reopened = store.make();
    assert!(reopened.initialize().await.unwrap().notices.is_empty());
}

/// Holds a deletion up behind its look at the leases, where it writes what outlives the run, until the session is ended.
async fn hold_up(store: &Store) -> std::process::Child {
    let holder = store.cluster.session(&store.schema, "BEGIN; LOCK TABLE coverage IN ACCESS EXCLUSIVE MODE;");
    let locked =
        "SELECT count(*) FROM pg_locks WHERE relation = 'coverage'::regclass AND mode = 'AccessExclusiveLock' AND granted";
    until("the table is held", async || store.sql(locked) == "1").await;
    holder
}

async fn is_held_up(store: &Store) {
    let waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'coverage'::regclass AND NOT granted";
    until("the deletion waits", async || store.sql(waiting) == "1").await;
}

fn release(mut holder: std::process::Child) {
    holder.kill().unwrap();
    holder.wait().unwrap();
}

/// A lease that is granted in the moment in which its run goes comes before it or after it: what was told stays.
#[tokio::test]
async fn a_lease_that_is_granted_while_its_run_goes_is_not_lost() {
    for guards in [vec![Guard::Unlocked], Vec::new()] {
        let store = store!();
        let (one, two) = (store.open().await, store.open().await);
        change(&one, "r", vec![create(0), set("n", NodeUpdate::success())]).await;
        let holder = hold_up(&store).await;
        let deletion =
            tokio::spawn(async move { change_guarded(&one, "r", guards, vec![Mutation::Delete { keep_coverage: true }]).await });
        is_held_up(&store).await;
        let mut granting = tokio::spawn(async move {
            let token = lock(&two, &LeaseKey::run(run_id("r")), "b", 60_000).await.unwrap();
            (two, token)
        });
        // It has to wait for the deletion, which waits for us.
        let waits = "SELECT count(*) FROM pg_locks AS w WHERE locktype = 'advisory' AND NOT granted AND EXISTS \
                     (SELECT FROM pg_locks AS d WHERE d.relation = 'coverage'::regclass AND NOT d.granted AND d.pid = ANY(pg_blocking_pids(w.pid)))";
        until("the grant waits, or is answered", async || granting.is_finished() || store.sql(waits) == "1").await;
        release(holder);
        applied(deletion.await.unwrap());
        let (two, token) = (&mut granting).await.unwrap();
        let held: Vec<_> = two.list_leases().await.unwrap().into_iter().map(|lease| lease.token).collect();
        assert_eq!(held, [token], "what was granted is held");
    }
}

/// Leases that go with their run are locked where all others are: taken later, they and a renewal of several could wait for one another.
#[tokio::test]
async fn leases_that_a_run_takes_along_are_locked_with_the_others() {
    let store = store!();
    let (one, two) = (store.open().await, store.open().await);
    for run in ["a", "b"] {
        change(&one, run, vec![create(0), set("n", NodeUpdate::success())]).await;
    }
    let (a, b) = (LeaseKey::node(run_id("a"), node_id("n")), LeaseKey::run(run_id("b")));
    let tokens = (lock(&one, &a, "w", 60_000).await.unwrap(), lock(&one, &b, "w", 60_000).await.unwrap());
    let [run_a, run_b] = [load(&one, "a").await, load(&one, "b").await];
    let mut fenced = entry(part_on(Some(&run_b), run_b.version(), "b", vec![], vec![set("n", NodeUpdate::running())]));
    fenced.fences.push(Fence { key: b.clone(), token: tokens.1 });
    let ends = part_on(Some(&run_a), run_a.version(), "a", vec![], vec![Mutation::Delete { keep_coverage: true }]);
    let holder = hold_up(&store).await;
    let ending = tokio::spawn(async move { commit(&one, vec![fenced, entry(ends)]).await });
    is_held_up(&store).await;
    let free = store.sql("SELECT run_id FROM locks ORDER BY run_id FOR UPDATE SKIP LOCKED");
    assert_eq!(free, "", "whoever renews both now has to wait for the first of them");
    let renewal =
        |key, token| Entry { leases: vec![LeaseMutation::Renew { key, token, at: at(1), ttl_ms: 60_000 }], ..Entry::default() };
    let renewals = vec![renewal(a, tokens.0), renewal(b, tokens.1)];
    let renewing = tokio::spawn(async move { commit(&two, renewals).await.outcomes });
    release(holder);
    ending.await.unwrap().outcomes.into_iter().for_each(|outcome| drop(applied(outcome)));
    let [first, second] = <[Outcome; 2]>::try_from(renewing.await.unwrap()).unwrap();
    drop(applied(second));
    // It came after the end, or before all of it.
    assert!(matches!(first, Outcome::Applied(_) | Outcome::Refused(Refusal::LeaseGone { .. })), "{first:?}");
}

/// Whoever asks with SQL whether a lock is held need not know how the holder's clock goes.
#[tokio::test]
async fn until_is_by_the_servers_clock() {
    let store = store!();
    let backend = store.open().await;
    let key = LeaseKey { run: run_id("a name"), node: None };
    // By a clock that stands at 1970.
    let token = lock(&backend, &key, "ann", 60_000).await.unwrap();
    let shown = || store.sql("SELECT until = expires_at, until - now() BETWEEN interval '30 s' AND interval '90 s' FROM locks");
    assert_eq!(shown(), "t|t");
    store.sql("UPDATE locks SET until = '1970-01-01'");
    let leases = vec![LeaseMutation::Renew { key, token, at: at(0), ttl_ms: 60_000 }];
    applied(commit(&backend, vec![Entry { leases, ..Entry::default() }]).await.outcomes.remove(0));
    assert_eq!(shown(), "t|t");
    let listed = backend.list_leases().await.unwrap().remove(0);
    assert!(listed.until > seeknal_state::model::Clock::now(&seeknal_state::model::SystemClock), "{listed:?}");
}
