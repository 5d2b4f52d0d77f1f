//! Leases: fences in the commit's own transaction, and, where leases are rows of the backend, granting and losing them.

use std::time::Duration;

use super::kit::{
    Bench, Fault, add_interval, applied, at, commit, create, ensure, ensure_eq, ensure_matches, fenced, lease_entry, node_id,
    nth, refused, run_id, set, status_of,
};
use super::{Chain, Harness};
use crate::model::{
    Entry, Fence, FencingToken, Guard, LeaseKey, LeaseMutation, Mutation, NodeStatus, NodeUpdate, Outcome, Refusal, RunStatus,
    RunUpdate,
};
use crate::store::LeaseStore;

/// Longer than any case runs.
const LONG: Duration = Duration::from_secs(600);
/// So short that a case can wait for its end.
const SHORT: Duration = Duration::from_millis(60);

fn run_key(run: &str) -> Result<LeaseKey, Fault> {
    Ok(LeaseKey::run(run_id(run)?))
}

fn node_key(run: &str, node: &str) -> Result<LeaseKey, Fault> {
    Ok(LeaseKey::node(run_id(run)?, node_id(node)?))
}

/// Sends a fenced write and says how it must end.
async fn write_under(bench: &Bench<'_>, key: &LeaseKey, token: FencingToken, held: bool, what: &str) -> Result<(), Fault> {
    let before = bench.state(key.run.as_str()).await?;
    let entry = fenced(Chain::on(&before).entry(vec![set("fenced", NodeUpdate::new().row_count(token.0))?])?, key, token);
    if held {
        bench.applied(entry).await.map_err(|fault| Fault::new(format!("{what}: {}", fault.into_text())))?;
        return Ok(());
    }
    let refusal = bench.refused(entry).await.map_err(|fault| Fault::new(format!("{what}: {}", fault.into_text())))?;
    ensure_eq!(refusal, Refusal::Fenced { fence: Fence { key: key.clone(), token } }, "{what}");
    ensure_eq!(bench.state(key.run.as_str()).await?, before, "{what}: nothing is written");
    Ok(())
}

pub(super) async fn a_lost_lease_fences(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    bench.create("other", 1).await?;
    for (key, wrong) in [(run_key("run")?, node_key("run", "n")?), (node_key("run", "n")?, run_key("run")?)] {
        let token = bench.grant(key.clone(), "first", LONG).await?;
        write_under(&bench, &key, token, true, "a write under a lease that is held").await?;
        write_under(&bench, &key, FencingToken(token.0 + 1), false, "a write under a token that was not granted").await?;
        write_under(&bench, &wrong, token, false, "a write under a lease on something else").await?;
        // The fence is on one run, the write on another one.
        let entry = bench.chain("other").await?.entry(vec![set("n", NodeUpdate::running())?])?;
        bench.applied(fenced(entry, &key, token)).await?;
        // In a chain, only what is fenced is refused (and what stands on it).
        let mut chain = bench.chain("run").await?;
        bench.release(&key, token).await?;
        let entries = vec![
            chain.entry(vec![add_interval("n", 0, 1)?])?,
            fenced(chain.entry(vec![add_interval("n", 1, 2)?])?, &key, token),
            chain.entry(vec![add_interval("n", 2, 3)?])?,
            bench.chain("other").await?.entry(vec![add_interval("n", 0, 1)?])?,
        ];
        let outcomes = bench.send(entries).await?;
        applied(nth(&outcomes, 0)?)?;
        ensure_matches!(refused(nth(&outcomes, 1)?)?, Refusal::Fenced { .. }, "a write under a released lease");
        ensure_matches!(refused(nth(&outcomes, 2)?)?, Refusal::Chained { .. }, "what stands on a fenced entry");
        applied(nth(&outcomes, 3)?)?;
        let next = bench.grant(key.clone(), "second", LONG).await?;
        ensure!(next > token, "the token {next} of a later grant is not above {token}");
        write_under(&bench, &key, token, false, "a write under the token of the holder before").await?;
        write_under(&bench, &key, next, true, "a write under the new token").await?;
        bench.release(&key, token).await?;
        write_under(&bench, &key, next, true, "a write after somebody released with an old token").await?;
        bench.release(&key, next).await?;
    }
    // All fences of an entry must hold.
    let (one, two) = (node_key("run", "n")?, node_key("run", "m")?);
    let first = bench.grant(one.clone(), "one", LONG).await?;
    let second = bench.grant(two.clone(), "two", LONG).await?;
    let both = |entry| fenced(fenced(entry, &one, first), &two, second);
    bench.applied(both(bench.chain("run").await?.entry(vec![set("n", NodeUpdate::running())?])?)).await?;
    bench.release(&two, second).await?;
    let refusal = bench.refused(both(bench.chain("run").await?.entry(vec![set("n", NodeUpdate::success())?])?)).await?;
    ensure_matches!(refusal, Refusal::Fenced { fence } if fence.key == two, "the second of two fences");
    Ok(())
}

pub(super) async fn an_expired_lease_fences(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    let key = run_key("run")?;
    let token = bench.grant(key.clone(), "sleeper", SHORT).await?;
    bench.wait_for_expiry("run").await?;
    write_under(&bench, &key, token, false, "a write under an expired lease").await?;
    let unlocked = bench.chain("run").await?.guarded(vec![Guard::Unlocked], vec![set("n", NodeUpdate::running())?])?;
    bench
        .applied(unlocked)
        .await
        .map_err(|fault| Fault::new(format!("an expired lease locks nothing: {}", fault.into_text())))?;
    if bench.has_lease_rows() {
        let renew = LeaseMutation::Renew { key: key.clone(), token, at: at(0), ttl_ms: 60_000 };
        ensure_eq!(
            bench.refused(lease_entry(renew)).await?,
            Refusal::LeaseGone { key: key.clone(), token },
            "renewing an expired lease"
        );
    }
    let next = bench.grant(key.clone(), "successor", LONG).await?;
    ensure!(next > token, "the token {next} of the successor is not above {token}");
    write_under(&bench, &key, token, false, "a write under an expired lease, beside its successor").await?;
    write_under(&bench, &key, next, true, "a write of the successor").await
}

pub(super) async fn unlocked_means_no_lease(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    bench.create("run ", 1).await?;
    bench.grant(run_key("run ")?, "a stranger", LONG).await?;
    for key in [run_key("run")?, node_key("run", "n")?] {
        let write =
            |chain: &mut Chain| chain.guarded(vec![Guard::Unlocked], vec![set("n", NodeUpdate::running())?]).map_err(Fault::from);
        bench.applied(write(&mut bench.chain("run").await?)?).await?;
        let token = bench.grant(key.clone(), "holder-7", LONG).await?;
        let before = bench.state("run").await?;
        let refusal = bench.refused(write(&mut Chain::on(&before))?).await?;
        ensure_matches!(&refusal, Refusal::Guard { guard: Guard::Unlocked, .. }, "a write on a locked run that must be unlocked");
        ensure!(refusal.to_string().contains("holder-7"), "the refusal names the holder, found {refusal}");
        let delete = Chain::on(&before).guarded(vec![Guard::Unlocked], vec![Mutation::Delete { keep_coverage: true }])?;
        ensure_matches!(bench.refused(delete).await?, Refusal::Guard { .. }, "deleting a locked run that must be unlocked");
        ensure_eq!(bench.state("run").await?, before, "a locked run");
        bench.release(&key, token).await?;
    }
    bench.applied(bench.chain("run").await?.guarded(vec![Guard::Unlocked], vec![set("n", NodeUpdate::success())?])?).await?;
    Ok(())
}

pub(super) async fn tokens_grow_over_reopening(harness: &dyn Harness) -> Result<(), Fault> {
    let mut bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    let key = run_key("run")?;
    let mut highest = 0;
    for round in 0..3 {
        if matches!(bench.backend.lease_store(), LeaseStore::Book(_)) {
            for count in [1, 1_000, 1, 7] {
                let block = bench.backend.reserve_tokens(count).await?;
                ensure_eq!(block.end.saturating_sub(block.start), count, "round {round}: the length of a block of tokens");
                ensure!(
                    block.start > highest,
                    "round {round}: tokens {block:?} begin at or below {highest}, which was given out"
                );
                highest = block.end - 1;
            }
        }
        for _ in 0..3 {
            let token = bench.grant(key.clone(), "holder", LONG).await?;
            ensure!(token.0 > highest, "round {round}: token {token} is not above {highest}, which was given out");
            highest = token.0;
            bench.release(&key, token).await?;
        }
        bench = if round == 1 { bench.crash().await? } else { bench.reopen().await? };
    }
    Ok(())
}

pub(super) async fn held_leases_are_listed(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    let keys = [node_key("run", "a")?, node_key("run", "b")?];
    let mut tokens = Vec::new();
    for key in &keys {
        tokens.push((key.clone(), bench.grant(key.clone(), "lister", LONG).await?));
    }
    let listed = bench.backend.list_leases().await?;
    let mut found: Vec<_> = listed.iter().map(|lease| (lease.key.clone(), lease.token)).collect();
    found.sort();
    ensure_eq!(found, tokens, "the leases that are held");
    for lease in &listed {
        ensure_eq!(&*lease.owner.name, "lister", "the owner of a lease");
        ensure_eq!(lease.owner.process.pid, std::process::id(), "the process of a lease's owner");
        ensure_eq!(lease.purpose.as_deref(), Some("conformance"), "the purpose of a lease");
        ensure_eq!(lease.ttl_ms, 600_000, "the time to live of a lease");
    }
    for (key, token) in tokens {
        bench.release(&key, token).await?;
    }
    ensure!(bench.backend.list_leases().await?.is_empty(), "released leases are not listed");
    Ok(())
}

pub(super) async fn run_and_node_leases_exclude_one_another(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    if !bench.has_lease_rows() {
        return Ok(());
    }
    bench.create("run", 0).await?;
    bench.create("other", 1).await?;
    let (run, a, b) = (run_key("run")?, node_key("run", "a")?, node_key("run", "b")?);
    let held = |holder: &LeaseKey, token: FencingToken, refusal: &Refusal| match refusal {
        Refusal::LeaseHeld { holder: found } => found.key == *holder && found.token == token && &*found.owner.name == "first",
        _ => false,
    };
    let first = bench.grant(a.clone(), "first", LONG).await?;
    for key in [&a, &run] {
        let refusal = bench.refused(lease_entry(bench.grant_of(key.clone(), "second", LONG))).await?;
        ensure!(held(&a, first, &refusal), "a grant on {key} beside {a}: found {refusal:?}");
    }
    let beside = bench.grant(b.clone(), "first", LONG).await?;
    ensure!(beside > first, "tokens grow over keys");
    bench.grant(node_key("other", "a")?, "first", LONG).await?;
    bench.release(&a, first).await?;
    let refusal = bench.refused(lease_entry(bench.grant_of(run.clone(), "second", LONG))).await?;
    ensure!(held(&b, beside, &refusal), "a grant on the run beside its other node: found {refusal:?}");
    bench.release(&b, beside).await?;
    let whole = bench.grant(run.clone(), "first", LONG).await?;
    for key in [&a, &b, &run] {
        let refusal = bench.refused(lease_entry(bench.grant_of(key.clone(), "second", LONG))).await?;
        ensure!(held(&run, whole, &refusal), "a grant on {key} beside the whole run: found {refusal:?}");
    }
    // Two grants of one batch are decided one after the other.
    bench.release(&run, whole).await?;
    let outcomes = bench
        .send(vec![
            lease_entry(bench.grant_of(a.clone(), "first", LONG)),
            lease_entry(bench.grant_of(run.clone(), "second", LONG)),
        ])
        .await?;
    let receipt = applied(nth(&outcomes, 0)?)?;
    ensure_matches!(refused(nth(&outcomes, 1)?)?, Refusal::LeaseHeld { .. }, "the second grant of a batch");
    ensure_eq!(receipt.grants.len(), 1, "the first grant of a batch");
    Ok(())
}

pub(super) async fn leases_are_renewed_released_and_forced(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    if !bench.has_lease_rows() {
        return Ok(());
    }
    bench.create("run", 0).await?;
    let key = run_key("run")?;
    // A renewal that reaches beyond the first end keeps the lease; the token stays.
    let token = bench.grant(key.clone(), "first", Duration::from_secs(5)).await?;
    bench.applied(lease_entry(LeaseMutation::Renew { key: key.clone(), token, at: at(10), ttl_ms: 600_000 })).await?;
    write_under(&bench, &key, token, true, "a write under a renewed lease").await?;
    // Not a token that a later grant here may get.
    let wrong = FencingToken(token.0 + 1_000_000);
    let renew = LeaseMutation::Renew { key: key.clone(), token: wrong, at: at(10), ttl_ms: 600_000 };
    ensure_eq!(
        bench.refused(lease_entry(renew)).await?,
        Refusal::LeaseGone { key: key.clone(), token: wrong },
        "renewing under another token"
    );
    // A renewal may also shorten.
    bench.applied(lease_entry(LeaseMutation::Renew { key: key.clone(), token, at: at(10), ttl_ms: 40 })).await?;
    bench.wait_for_expiry("run").await?;
    write_under(&bench, &key, token, false, "a write after the end of a renewal").await?;

    let old = token;
    let token = bench.grant(key.clone(), "second", LONG).await?;
    bench.applied(lease_entry(LeaseMutation::Release { key: key.clone(), token: old })).await?;
    write_under(&bench, &key, token, true, "releasing with an old token is no error and changes nothing").await?;
    bench.applied(lease_entry(LeaseMutation::Force { token })).await?;
    write_under(&bench, &key, token, false, "a write under a lease that was taken away").await?;
    let renew = LeaseMutation::Renew { key: key.clone(), token, at: at(20), ttl_ms: 600_000 };
    ensure_eq!(
        bench.refused(lease_entry(renew)).await?,
        Refusal::LeaseGone { key: key.clone(), token },
        "renewing a lease that was taken away"
    );
    ensure!(bench.backend.list_leases().await?.is_empty(), "a lease that was taken away is not listed");
    let next = bench.grant(key.clone(), "third", LONG).await?;
    ensure!(next > token, "a token after a forced end");
    Ok(())
}

pub(super) async fn leases_travel_with_writes(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    if !bench.has_lease_rows() {
        return Ok(());
    }
    bench.create("run", 0).await?;
    let key = node_key("run", "n")?;
    // A claim: the grant and the move to running are one.
    let mut claim = bench.chain("run").await?.entry(vec![set("n", NodeUpdate::running())?])?;
    claim.leases.push(bench.grant_of(key.clone(), "worker", LONG));
    let batch = std::sync::Arc::new(crate::model::Batch::new(vec![claim]));
    let answer = commit(&bench.backend, std::sync::Arc::clone(&batch)).await?;
    let receipt = applied(nth(&answer.outcomes, 0)?)?;
    let token =
        receipt.grants.first().map(|grant| grant.token).ok_or_else(|| Fault::new("a claim is answered with its token"))?;
    ensure_eq!(commit(&bench.backend, batch).await?, answer, "a grant that is sent again gives the same token");
    // A second claim changes neither the node nor the lease.
    let before = bench.state("run").await?;
    let mut claim = Chain::on(&before).entry(vec![set("n", NodeUpdate::success())?])?;
    claim.leases.push(bench.grant_of(key.clone(), "thief", LONG));
    ensure_matches!(bench.refused(claim).await?, Refusal::LeaseHeld { .. }, "a second claim");
    ensure_eq!(bench.state("run").await?, before, "a refused claim");
    // A refused write takes no lease.
    let mut claim =
        Chain::on(&before).guarded(vec![Guard::RunStatus(vec![RunStatus::Failed])], vec![set("m", NodeUpdate::running())?])?;
    claim.leases.push(bench.grant_of(node_key("run", "m")?, "worker", LONG));
    ensure_matches!(bench.refused(claim).await?, Refusal::Guard { .. }, "a claim whose guard does not hold");
    ensure_eq!(bench.backend.list_leases().await?.len(), 1, "a refused claim grants nothing");
    // The last write and the release are one; the fence is looked at before the release.
    let mut done = fenced(Chain::on(&before).entry(vec![set("n", NodeUpdate::success())?])?, &key, token);
    done.leases.push(LeaseMutation::Release { key: key.clone(), token });
    bench.applied(done).await?;
    ensure_eq!(status_of(&bench.state("run").await?, "n"), Some(NodeStatus::Success), "the last write under a lease");
    ensure!(bench.backend.list_leases().await?.is_empty(), "the released lease");
    Ok(())
}

pub(super) async fn tokens_are_raised_for_good(harness: &dyn Harness) -> Result<(), Fault> {
    const FAR: u64 = 7_000_000_000;
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    let first = bench.grant(node_key("run", "a")?, "worker", LONG).await?;
    ensure!(bench.backend.highest_token().await? >= first.0, "the highest token is not lower than {first}");
    bench.backend.raise_tokens(FAR).await?;
    bench.backend.raise_tokens(first.0).await?;
    let second = bench.grant(node_key("run", "b")?, "worker", LONG).await?;
    ensure!(second.0 > FAR, "token {second} was given out after {FAR}");
    let bench = bench.reopen().await?;
    let third = bench.grant(node_key("run", "c")?, "worker", LONG).await?;
    ensure!(third > second, "token {third} was given out after {second}");
    ensure!(bench.backend.highest_token().await? >= third.0, "the highest token is not lower than {third}");
    Ok(())
}

pub(super) async fn a_run_that_ends_is_unlocked_for_what_follows(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    bench.grant(node_key("run", "n")?, "worker", LONG).await?;
    let mut chain = bench.chain("run").await?;
    let entries = vec![
        chain.entry(vec![Mutation::Update { update: RunUpdate::success(), at: at(5) }])?,
        chain.guarded(vec![Guard::Unlocked], vec![set("late", NodeUpdate::skipped())?])?,
    ];
    let outcomes = bench.send(entries).await?;
    ensure_matches!(
        outcomes.as_slice(),
        [Outcome::Applied(_), Outcome::Applied(_)],
        "what is to be unlocked, behind the end of its run in one batch"
    );
    ensure!(bench.backend.list_leases().await?.is_empty(), "the end of the run freed its lease");
    Ok(())
}

pub(super) async fn a_lease_that_is_given_back_with_a_write_is_void_behind_it(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("run", 0).await?;
    let key = node_key("run", "n")?;
    let token = bench.grant(key.clone(), "worker", LONG).await?;
    let mut chain = bench.chain("run").await?;
    let mut done = fenced(chain.entry(vec![set("n", NodeUpdate::success())?])?, &key, token);
    done.leases.push(LeaseMutation::Release { key: key.clone(), token });
    let entries = vec![
        done,
        chain.guarded(vec![Guard::Unlocked], vec![set("beside", NodeUpdate::skipped())?])?,
        fenced(chain.entry(vec![set("n", NodeUpdate::new().row_count(1))?])?, &key, token),
    ];
    let outcomes = bench.send(entries).await?;
    applied(nth(&outcomes, 0)?)?;
    applied(nth(&outcomes, 1)?)?;
    ensure_matches!(
        refused(nth(&outcomes, 2)?)?,
        Refusal::Fenced { .. },
        "a write under a lease that was given back before it in the batch"
    );
    ensure!(bench.backend.list_leases().await?.is_empty(), "the lease that was given back");
    write_under(&bench, &key, token, false, "a write under a lease that was given back with an earlier write").await
}

pub(super) async fn the_end_of_a_run_frees_its_leases(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    bench.create("other", 0).await?;
    let kept = bench.grant(node_key("other", "n")?, "other", LONG).await?;
    for (index, end) in [
        Mutation::Update { update: RunUpdate::success(), at: at(5) },
        Mutation::Update { update: RunUpdate::failed(), at: at(5) },
        Mutation::Update { update: RunUpdate::cancelled(), at: at(5) },
        Mutation::Delete { keep_coverage: false },
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("run {index}");
        bench.write(&name, vec![create(1)]).await?;
        let keys = [node_key(&name, "a")?, node_key(&name, "b")?];
        let mut tokens = Vec::new();
        for key in &keys {
            tokens.push(bench.grant(key.clone(), "worker", LONG).await?);
        }
        bench.write(&name, vec![Mutation::Update { update: RunUpdate::new().metadata("k", 1), at: at(4) }]).await?;
        ensure_eq!(bench.backend.list_leases().await?.len(), 3, "a change of the header frees nothing");
        // The holder itself may end the run.
        let (Some(key), Some(token)) = (keys.first(), tokens.first()) else { return Err(Fault::new("no lease")) };
        bench.applied(fenced(bench.chain(&name).await?.entry(vec![end.clone()])?, key, *token)).await?;
        let listed: Vec<_> = bench.backend.list_leases().await?.into_iter().map(|lease| lease.token).collect();
        ensure_eq!(listed, [kept], "the leases that are left after {end:?}");
        let entry = bench.chain("other").await?.entry(vec![set("m", NodeUpdate::running())?])?;
        ensure_matches!(
            bench.refused(fenced(entry, key, *token)).await?,
            Refusal::Fenced { .. },
            "a write under a lease of an ended run"
        );
    }
    // A refused end frees nothing.
    bench.create("refused", 9).await?;
    bench.grant(run_key("refused")?, "worker", LONG).await?;
    let mut chain = bench.chain("refused").await?;
    let end = chain.guarded(
        vec![Guard::NodeStatus { node: node_id("n")?, one_of: Vec::new() }],
        vec![Mutation::Delete { keep_coverage: false }],
    )?;
    bench.refused(Entry { ..end }).await?;
    ensure_eq!(bench.backend.list_leases().await?.len(), 2, "a refused deletion frees nothing");
    Ok(())
}

/// What is granted before its run ends in the same batch needs a free way all the same: who was told of it may have written under it.
pub(super) async fn a_grant_before_the_end_of_its_run_is_refused_where_it_is_held(harness: &dyn Harness) -> Result<(), Fault> {
    let bench = Bench::open(harness).await?;
    if !bench.has_lease_rows() {
        return Ok(());
    }
    let of_run = |run: &str, whole: bool| if whole { run_key(run) } else { node_key(run, "n") };
    for (index, (held, asked)) in [(false, false), (true, false), (false, true), (true, true)].into_iter().enumerate() {
        for end in [Mutation::Update { update: RunUpdate::cancelled(), at: at(5) }, Mutation::Delete { keep_coverage: true }] {
            let run = format!("run {index} {}", if matches!(end, Mutation::Delete { .. }) { "goes" } else { "ends" });
            bench.write(&run, vec![create(1), set("n", NodeUpdate::pending())?]).await?;
            let (held, asked) = (of_run(&run, held)?, of_run(&run, asked)?);
            let token = bench.grant(held.clone(), "holder", LONG).await?;
            let grant = || bench.grant_of(asked.clone(), "thief", LONG);
            // As a claim: the end stands on it.
            let mut chain = bench.chain(&run).await?;
            let mut claim = chain.entry(vec![set("n", NodeUpdate::running())?])?;
            claim.leases.push(grant());
            let outcomes = bench.send(vec![claim, chain.entry(vec![end.clone()])?]).await?;
            ensure_matches!(
                outcomes.as_slice(),
                [Outcome::Refused(Refusal::LeaseHeld { .. }), Outcome::Refused(Refusal::Chained { .. })],
                "a claim of {asked} where {held} is held, before {end:?}"
            );
            ensure_eq!(status_of(&bench.state(&run).await?, "n"), Some(NodeStatus::Pending), "a refused claim");
            // Given back before, the way is free.
            let release = lease_entry(LeaseMutation::Release { key: held.clone(), token });
            let other = bench.grant(run_key("elsewhere")?, "holder", LONG).await?;
            let outcomes =
                bench.send(vec![release, lease_entry(grant()), bench.chain(&run).await?.entry(vec![end.clone()])?]).await?;
            ensure_matches!(
                outcomes.as_slice(),
                [Outcome::Applied(_), Outcome::Applied(_), Outcome::Applied(_)],
                "a grant of {asked} after {held} was given back, before {end:?}"
            );
            let listed: Vec<_> = bench.backend.list_leases().await?.into_iter().map(|lease| lease.token).collect();
            ensure_eq!(listed, [other], "the end of the run freed what was granted before it");
            bench.release(&run_key("elsewhere")?, other).await?;
            // Alone: the end does not stand on it.
            let again = format!("{run} again");
            bench.create(&again, 2).await?;
            let (held, asked) = (LeaseKey { run: run_id(&again)?, ..held }, LeaseKey { run: run_id(&again)?, ..asked });
            bench.grant(held, "holder", LONG).await?;
            let grant = lease_entry(bench.grant_of(asked, "thief", LONG));
            let outcomes = bench.send(vec![grant, bench.chain(&again).await?.entry(vec![end.clone()])?]).await?;
            ensure_matches!(
                outcomes.as_slice(),
                [Outcome::Refused(Refusal::LeaseHeld { .. }), Outcome::Applied(_)],
                "a grant of what is held, before {end:?}"
            );
        }
    }
    Ok(())
}
