//! Leases as rows: exclusion, expiry, fences, force, tokens that never go back.

use super::*;

#[tokio::test]
async fn leases_exclude_expire_and_fence() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
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
    assert_eq!(listed[0].owner, owner_like(&listed[0].owner, "a"));
    let unlocked = change_guarded(&two, "r", vec![Guard::Unlocked], vec![set("n", NodeUpdate::running())]).await;
    assert!(matches!(refused(unlocked), Refusal::Guard { guard: Guard::Unlocked, .. }));

    // Under the token it may write; under another one it may not.
    let fenced = |token: FencingToken| Fence { key: LeaseKey::run(run_id("r")), token };
    let write = |fence: Fence, tip: RunState| {
        let part = part_on(Some(&tip), tip.version(), "r", vec![], vec![set("n", NodeUpdate::new())]);
        Entry { parts: vec![part], fences: vec![fence], ..Entry::default() }
    };
    applied(commit(&one, vec![write(fenced(token), load(&one, "r").await)]).await.outcomes.remove(0));
    let wrong = commit(&one, vec![write(fenced(FencingToken(token.0 + 1)), load(&one, "r").await)]).await.outcomes.remove(0);
    assert!(matches!(refused(wrong), Refusal::Fenced { .. }));

    // An old token renews and releases nothing.
    let lease = |mutation| Entry { leases: vec![mutation], ..Entry::default() };
    let old = FencingToken(0);
    let renew = |token| lease(LeaseMutation::Renew { key: LeaseKey::run(run_id("r")), token, at: at(1), ttl_ms: 60_000 });
    assert!(matches!(refused(commit(&one, vec![renew(old)]).await.outcomes.remove(0)), Refusal::LeaseGone { .. }));
    applied(commit(&one, vec![renew(token)]).await.outcomes.remove(0));
    applied(commit(&one, vec![lease(LeaseMutation::Release { key: run.clone(), token: old })]).await.outcomes.remove(0));
    assert_eq!(one.list_leases().await.unwrap().len(), 1);

    // Taken away by somebody else: the holder's writes are refused.
    assert!(matches!(
        refused(commit(&two, vec![lease(LeaseMutation::Force { token: FencingToken(999_999) })]).await.outcomes.remove(0)),
        Refusal::LeaseGone { .. }
    ));
    applied(commit(&two, vec![lease(LeaseMutation::Force { token })]).await.outcomes.remove(0));
    assert!(matches!(
        refused(commit(&one, vec![write(fenced(token), load(&one, "r").await)]).await.outcomes.remove(0)),
        Refusal::Fenced { .. }
    ));

    // A lease of zero milliseconds is over when it is granted: the next one takes it over, with a higher token.
    let brief = lock(&one, &node, "a", 0).await.unwrap();
    assert!(one.list_leases().await.unwrap().is_empty());
    let next = lock(&two, &run, "b", u64::MAX).await.unwrap();
    assert!(next > brief && brief > token);
    assert_eq!(one.list_leases().await.unwrap().len(), 1);
    assert!(matches!(refused(commit(&one, vec![renew(brief)]).await.outcomes.remove(0)), Refusal::LeaseGone { .. }));
}

fn owner_like(seen: &LeaseOwner, name: &str) -> LeaseOwner {
    let mut like = owner(name);
    like.process.id = Arc::clone(&seen.process.id);
    like
}

/// Storage stalls (somebody else holds the write lock) while data and renewals come in by turns: in what is written next, the renewals go first.
#[tokio::test]
async fn renewals_go_before_data_that_waited_longer() {
    const PAIRS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    change(&backend, "r", vec![create(0)]).await;
    let key = LeaseKey::run(run_id("r"));
    let token = lock(&backend, &key, "a", 60_000).await.unwrap();
    let stall = raw(&db(dir.path()));
    stall.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut sent = Vec::new();
    for number in 0..PAIRS {
        let part = part_on(None, Version::NONE, &format!("data {number}"), vec![], vec![create(0)]);
        let renew = LeaseMutation::Renew { key: key.clone(), token, at: at(1), ttl_ms: 60_000 };
        for entry in [entry(part), Entry { leases: vec![renew], ..Entry::default() }] {
            let backend = Arc::clone(&backend);
            sent.push(tokio::spawn(async move { applied(commit(&backend, vec![entry]).await.outcomes.remove(0)).seq }));
        }
    }
    // Every task is polled once before this one goes on: all of them are at the writer, which had taken some before.
    tokio::task::yield_now().await;
    stall.execute_batch("ROLLBACK").unwrap();
    let mut seqs = Vec::new();
    for answer in sent {
        seqs.push(answer.await.unwrap());
    }
    // A pair that the writer took in two transactions stays as it was; there is at most one such.
    let overtook = seqs.chunks(2).filter(|pair| pair[1] < pair[0]).count();
    assert!(overtook >= PAIRS - 1, "{overtook} of {PAIRS}: {seqs:?}");
}

#[tokio::test]
async fn several_leases_are_granted_together_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    let key = |node: &str| LeaseKey::node(run_id("r"), node_id(node));
    lock(&backend, &key("b"), "other", 60_000).await.unwrap();
    let both = Entry {
        leases: ["a", "b"]
            .map(|node| LeaseMutation::Grant { key: key(node), owner: owner("me"), purpose: None, at: at(0), ttl_ms: 60_000 })
            .into(),
        ..Entry::default()
    };
    assert!(matches!(refused(commit(&backend, vec![both]).await.outcomes.remove(0)), Refusal::LeaseHeld { .. }));
    assert_eq!(backend.list_leases().await.unwrap().len(), 1);
    lock(&backend, &key("a"), "third", 60_000).await.unwrap();
}

/// What could not be given back, because the disk was full, holds nobody up.
#[tokio::test]
async fn a_lease_that_an_opening_left_behind_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(&db(dir.path())).await, open(&db(dir.path())).await);
    let key = LeaseKey::run(run_id("r"));
    let owner = LeaseOwner { process: one.process().unwrap(), ..owner("a") };
    let grant = LeaseMutation::Grant { key: key.clone(), owner, purpose: None, at: at(0), ttl_ms: 60_000 };
    applied(commit(&one, vec![Entry { leases: vec![grant], ..Entry::default() }]).await.outcomes.remove(0));
    assert!(matches!(lock(&two, &key, "b", 60_000).await.unwrap_err(), Refusal::LeaseHeld { .. }));
    one.close().await.unwrap();
    lock(&two, &key, "b", 60_000).await.unwrap();
    two.close().await.unwrap();
    open(&db(dir.path())).await.close().await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("state.db.owners")).unwrap().count(), 0, "the next opening sweeps");
}

#[tokio::test]
async fn ending_or_deleting_a_run_frees_its_locks() {
    let dir = tempfile::tempdir().unwrap();
    let backend = open(&db(dir.path())).await;
    for last in [Mutation::Update { update: RunUpdate::success(), at: at(9) }, Mutation::Delete { keep_coverage: true }] {
        change(&backend, "r", vec![create(0)]).await;
        let token = lock(&backend, &LeaseKey::node(run_id("r"), node_id("n")), "a", 60_000).await.unwrap();
        let others = lock(&backend, &LeaseKey::run(run_id("r2")), "a", 60_000).await.unwrap();
        change(&backend, "r", vec![last.clone()]).await;
        let left: Vec<_> = backend.list_leases().await.unwrap().into_iter().map(|lease| lease.token).collect();
        assert_eq!(left, [others], "{token} stayed");
        commit(&backend, vec![Entry { leases: vec![LeaseMutation::Force { token: others }], ..Entry::default() }]).await;
        if !matches!(last, Mutation::Delete { .. }) {
            change(&backend, "r", vec![Mutation::Delete { keep_coverage: false }]).await;
        }
    }
}

#[tokio::test]
async fn numbers_go_on_over_a_restored_backup() {
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let key = LeaseKey::run(run_id("r"));
    let backend = open(&path).await;
    change(&backend, "first", vec![create(0)]).await;
    backend.close().await.unwrap();
    let copy = std::fs::read(&path).unwrap();
    let backend = open(&path).await;
    let token = lock(&backend, &key, "a", 1).await.unwrap();
    let receipt = change(&backend, "second", vec![create(0)]).await;
    backend.close().await.unwrap();
    std::fs::write(&path, copy).unwrap();
    let backend = open(&path).await;
    assert!(lock(&backend, &key, "a", 60_000).await.unwrap() > token);
    let again = change(&backend, "second", vec![create(0)]).await;
    assert!(again.seq > receipt.seq && again.runs[0].after > receipt.runs[0].after);
}

/// Holds a lock of five seconds and writes under it, until a sync takes longer than that.
#[tokio::test]
#[ignore = "it is run by another test, with a disk that becomes slow"]
async fn child_whose_disk_becomes_slow() {
    use seeknal_state::{LeaseKey, LockOptions, LostReason, NewRun};
    let backend = create_state_backend("database", &BackendOptions::new().base_path(std::env::var_os("STATE_FOLDER").unwrap()));
    let state = Coordinator::open(backend.unwrap()).await.unwrap();
    state.create_run("r", NewRun::running()).await.unwrap();
    let options = LockOptions::new().ttl(Duration::from_secs(5));
    let lease = state.acquire(LeaseKey::run(run_id("r")), options, Duration::ZERO).await.unwrap().unwrap();
    let fenced = state.with_lease(&lease);
    let mut written = 0_u64;
    let lost = loop {
        tokio::select! {
            reason = lease.lost() => break reason,
            result = fenced.set_node_state("r", "n", NodeUpdate::running().row_count(written)) => match result {
                Ok(_) => written += 1,
                Err(error) => {
                    assert!(error.is_lease_lost(), "{error}");
                    break lease.lost().await;
                }
            }
        }
    };
    assert_eq!(lost, LostReason::Storage, "after {written} writes");
    assert!(written > 2, "the disk was fast at first");
    let refused = fenced.set_node_state("r", "n", NodeUpdate::success()).await.unwrap_err();
    assert!(refused.is_lease_lost(), "{refused}");
    println!("lost after {written} writes");
    state.close().await.unwrap();
}

/// A sync that takes eight seconds outlasts a lease of five: its holder is told so, in time, and why.
#[test]
fn a_disk_that_becomes_slow_costs_the_lease_and_says_so() {
    if !super::trace::can_trace() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let child = super::trace::Child::test("leases::child_whose_disk_becomes_slow").env("STATE_FOLDER", folder.path());
    child.inject(super::trace::SYNCS, "delay_enter=8000000:when=30..31").run().passed("a slow disk");
}

/// The boot id cannot be read: run by the next test.
#[tokio::test]
#[ignore = "it is run by another test, which hides the boot id from it"]
async fn child_that_does_not_know_the_boot() {
    let backend = open(&PathBuf::from(std::env::var_os("STATE").unwrap())).await;
    assert_eq!(backend.list_leases().await.unwrap().len(), 1, "it sees the locks of others");
    for run in ["r", "free"] {
        let grant = Batch::new(vec![grant(LeaseKey::run(run_id(run)), "b", 60_000)]);
        let error = backend.commit(Arc::new(grant)).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unsupported, "{error}");
        assert!(error.is_of_one_entry() && error.to_string().contains("/proc/sys/kernel/random/boot_id"), "{error}");
    }
    let deleted = change_guarded(&backend, "r", vec![Guard::Unlocked], vec![Mutation::Delete { keep_coverage: true }]).await;
    assert!(matches!(refused(deleted), Refusal::Guard { guard: Guard::Unlocked, .. }));
    change(&backend, "r", vec![set("n", NodeUpdate::running())]).await;
    backend.close().await.unwrap();
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_process_that_does_not_know_the_boot_takes_no_lock_over() {
    if !trace::can_trace() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = db(dir.path());
    let backend = open(&path).await;
    change(&backend, "r", vec![create(0)]).await;
    let key = LeaseKey::run(run_id("r"));
    let token = lock(&backend, &key, "a", 600_000).await.unwrap();
    let child = trace::Child::test("leases::child_that_does_not_know_the_boot").env("STATE", &path);
    let child = child.inject("openat", "error=EACCES").on(Path::new("/proc/sys/kernel/random/boot_id"));
    tokio::task::spawn_blocking(|| child.run().passed("without a boot id")).await.unwrap();
    assert_eq!(backend.list_leases().await.unwrap()[0].token, token, "it is held as before");
    let renew = LeaseMutation::Renew { key, token, at: at(1), ttl_ms: 60_000 };
    applied(commit(&backend, vec![Entry { leases: vec![renew], ..Entry::default() }]).await.outcomes.remove(0));
}
