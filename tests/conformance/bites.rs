//! The conformance suite objects: backends that break one promise each, and the case that must see it.
#![cfg(feature = "conformance")]

use std::ops::Range;
use std::sync::{Arc, Mutex};

use seeknal_state::model::{
    Batch, BatchAnswer, Entry, Guard, LeaseRecord, Mutation, NodeCoverage, NodeId, NodeState, Outcome, Receipt, Refusal,
    Retained, RunId, RunPage, RunQuery, RunState, Version,
};
use seeknal_state::store::conformance::{Harness, run_all, run_case};
use seeknal_state::store::{BoxFuture, LeaseStore, MemoryBackend, OpenReport, StateBackend, StoreError, VerifyReport};

/// The promise that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// None: the provided methods of the trait, over an honest store.
    Nothing,
    ForgetsGuards,
    ForgetsFences,
    ForgetsBatchIds,
    ForgetsRefusedChains,
    SplitsEntriesOverRuns,
    NeverFindsStale,
    AlwaysFindsStale,
    OverwritesStrangersRows,
    KeepsNoCoverage,
    KeepsEveryCoverage,
    RetainsNothing,
    ListsOldestFirst,
    IgnoresTheCursor,
    LosesTheLastPage,
    MatchesPrefixesInAnyCase,
    RoundsNumbers,
    TrimsIds,
    ReordersForeignText,
    LosesRowVersions,
    StartsVersionsAnew,
    StartsTokensAnew,
    StaysOpen,
    ForgetsOnReopening,
    IsNeverSound,
    ReadsRunsOneByOne,
    WritesOnlyWhenItIsClosed,
}

#[derive(Debug)]
struct Liar {
    inner: MemoryBackend,
    lie: Lie,
}

impl Liar {
    fn bend_entry(&self, entry: &mut Entry) {
        if self.lie == Lie::ForgetsFences {
            entry.fences.clear();
        }
        for part in &mut entry.parts {
            match self.lie {
                Lie::ForgetsGuards => part.guards.retain(|guard| *guard == Guard::Unlocked),
                Lie::NeverFindsStale => part.base = Version(u64::MAX),
                Lie::TrimsIds => {
                    part.run = RunId::new(part.run.as_str().trim()).unwrap_or_else(|_| part.run.clone());
                    part.after = None;
                }
                _ => {}
            }
            for mutation in &mut part.mutations {
                if let Mutation::Delete { keep_coverage } = mutation {
                    *keep_coverage = match self.lie {
                        Lie::KeepsNoCoverage => false,
                        Lie::KeepsEveryCoverage => true,
                        _ => *keep_coverage,
                    };
                }
            }
        }
    }

    async fn lying_commit(&self, batch: Arc<Batch>) -> Result<BatchAnswer, StoreError> {
        let mut bent = Batch::clone(&batch);
        bent.entries.iter_mut().for_each(|entry| self.bend_entry(entry));
        match self.lie {
            Lie::ForgetsBatchIds => bent = Batch::new(bent.entries),
            Lie::ForgetsRefusedChains | Lie::SplitsEntriesOverRuns => return self.piecewise(bent).await,
            Lie::AlwaysFindsStale => {
                for part in bent.entries.iter().flat_map(|entry| &entry.parts) {
                    let now = self.inner.run_version(&part.run).await?;
                    if now.is_some_and(|now| now != part.base) {
                        let refusal = Refusal::Stale { run: part.run.clone() };
                        return Ok(BatchAnswer { outcomes: vec![Outcome::Refused(refusal); bent.entries.len()] });
                    }
                }
            }
            Lie::OverwritesStrangersRows => self.overwrite(&mut bent).await?,
            _ => {}
        }
        self.inner.commit(Arc::new(bent)).await
    }

    /// Every entry (or every part of one) as a batch of its own.
    async fn piecewise(&self, batch: Batch) -> Result<BatchAnswer, StoreError> {
        let mut outcomes = Vec::new();
        for entry in batch.entries {
            if self.lie == Lie::ForgetsRefusedChains || entry.parts.len() < 2 {
                outcomes.extend(self.inner.commit(Arc::new(Batch::new(vec![entry]))).await?.outcomes);
                continue;
            }
            let (mut receipt, mut refused) = (None::<Receipt>, None);
            for part in entry.parts {
                let piece = Entry { parts: vec![part], ..Entry::default() };
                for outcome in self.inner.commit(Arc::new(Batch::new(vec![piece]))).await?.outcomes {
                    match (outcome, &mut receipt) {
                        (Outcome::Applied(more), Some(receipt)) => receipt.runs.extend(more.runs),
                        (Outcome::Applied(first), none) => *none = Some(first),
                        (Outcome::Refused(refusal), _) => refused = Some(refusal),
                    }
                }
            }
            outcomes.extend(refused.map(Outcome::Refused).or(receipt.map(Outcome::Applied)));
        }
        Ok(BatchAnswer { outcomes })
    }

    /// Writes the predicted state of the whole run, whoever wrote to it in between.
    async fn overwrite(&self, batch: &mut Batch) -> Result<(), StoreError> {
        for part in batch.entries.iter_mut().flat_map(|entry| &mut entry.parts) {
            let (Some(now), Some(after)) = (self.inner.load_run(&part.run).await?, part.after.clone()) else { continue };
            if now.version() != part.expect && part.base >= now.created_version() && part.base < now.version() {
                part.base = now.version();
                part.expect = now.version();
                let nodes = after.nodes().map(|(id, node)| (id.clone(), node.clone()));
                part.after = Some(RunState::from_parts(
                    part.run.clone(),
                    after.header().clone(),
                    now.version().next(),
                    now.created_version(),
                    nodes,
                ));
            }
        }
        Ok(())
    }

    fn bend_run(&self, run: RunState) -> RunState {
        let bend = |node: &NodeState| {
            let mut node = node.clone();
            match self.lie {
                #[expect(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "this is the lie"
                )]
                Lie::RoundsNumbers => node.row_count = node.row_count.map(|rows| rows as f64 as u64),
                Lie::ReordersForeignText => {
                    node.extra = node.extra.and_then(|raw| raw.to_value().ok()).map(|value| (&value).into());
                }
                Lie::LosesRowVersions => node.version = run.version(),
                _ => {}
            }
            node
        };
        let nodes: Vec<_> = run.nodes().map(|(id, node)| (id.clone(), bend(node))).collect();
        RunState::from_parts(run.id().clone(), run.header().clone(), run.version(), run.created_version(), nodes)
    }
}

impl StateBackend for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.inner.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        Box::pin(self.lying_commit(batch))
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        Box::pin(async move {
            let trimmed = RunId::new(run.as_str().trim()).unwrap_or_else(|_| run.clone());
            let id = if self.lie == Lie::TrimsIds { &trimmed } else { run };
            let found = self.inner.load_run(id).await?.map(|state| self.bend_run(state));
            if self.lie == Lie::StartsVersionsAnew {
                return Ok(found.map(|state| {
                    let back = |version: Version| Version(version.0 - state.created_version().0 + 1);
                    let nodes = state.nodes().map(|(id, node)| (id.clone(), node.clone()));
                    RunState::from_parts(
                        run.clone(),
                        state.header().clone(),
                        back(state.version()),
                        back(state.created_version()),
                        nodes,
                    )
                }));
            }
            Ok(found)
        })
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        Box::pin(async move {
            let mut asked = query.clone();
            match self.lie {
                Lie::IgnoresTheCursor => asked.after = None,
                Lie::MatchesPrefixesInAnyCase => asked.filter.id_prefix = None,
                _ => {}
            }
            let mut page = self.inner.list_runs(&asked).await?;
            match self.lie {
                Lie::ListsOldestFirst => page.runs.reverse(),
                Lie::LosesTheLastPage => page.next = None,
                Lie::MatchesPrefixesInAnyCase => {
                    let prefix = query.filter.id_prefix.clone().unwrap_or_default().to_lowercase();
                    page.runs.retain(|run| run.run_id.as_str().to_lowercase().starts_with(&prefix));
                }
                _ => {}
            }
            Ok(page)
        })
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.inner.list_leases()
    }

    fn lease_store(&self) -> LeaseStore {
        self.inner.lease_store()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        if self.lie == Lie::StartsTokensAnew {
            return Box::pin(async move { Ok(1..1 + count) });
        }
        self.inner.reserve_tokens(count)
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        if self.lie == Lie::RetainsNothing {
            return Box::pin(async { Ok(Vec::new()) });
        }
        self.inner.retained()
    }

    fn verify(&self) -> BoxFuture<'_, Result<VerifyReport, StoreError>> {
        Box::pin(async {
            let mut report = VerifyReport::new();
            if self.lie == Lie::IsNeverSound {
                report.problems.push("it says so".to_owned());
            }
            Ok(report)
        })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        if self.lie == Lie::StaysOpen {
            return Box::pin(async { Ok(()) });
        }
        self.inner.close()
    }
}

/// Reads several runs, and the parts of what a node completed, one after the other, whoever writes in between. A type of its own, so that the liar has the provided method.
#[derive(Debug)]
struct OneByOne(Liar);

impl StateBackend for OneByOne {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        self.0.initialize()
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.0.commit(batch)
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.0.load_run(run)
    }

    fn reload_runs<'a>(
        &'a self,
        runs: &'a [(RunId, Option<RunState>)],
    ) -> BoxFuture<'a, Result<Vec<Option<RunState>>, StoreError>> {
        Box::pin(async move {
            let mut states = Vec::new();
            for (run, _) in runs {
                states.push(self.load_run(run).await?);
                tokio::task::yield_now().await;
            }
            Ok(states)
        })
    }

    fn coverage<'a>(&'a self, node: &'a NodeId) -> BoxFuture<'a, Result<NodeCoverage, StoreError>> {
        Box::pin(async move {
            let mut coverage = self.0.coverage(node).await?;
            tokio::task::yield_now().await;
            coverage.partitions = self.0.coverage(node).await?.partitions;
            Ok(coverage)
        })
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.0.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.0.list_leases()
    }
}

/// What rests of a backend that writes only when it is closed.
type Disk = Arc<Mutex<Vec<Arc<Batch>>>>;

/// Answers from memory, and writes all of it when it is closed.
#[derive(Debug)]
struct Unwritten {
    inner: MemoryBackend,
    disk: Disk,
    in_memory: Mutex<Vec<Arc<Batch>>>,
}

impl StateBackend for Unwritten {
    fn name(&self) -> &'static str {
        "unwritten"
    }

    fn initialize(&self) -> BoxFuture<'_, Result<OpenReport, StoreError>> {
        Box::pin(async {
            let there = self.disk.lock().unwrap().clone();
            for batch in there {
                self.inner.commit(batch).await?;
            }
            self.inner.initialize().await
        })
    }

    fn commit(&self, batch: Arc<Batch>) -> BoxFuture<'_, Result<BatchAnswer, StoreError>> {
        self.in_memory.lock().unwrap().push(Arc::clone(&batch));
        self.inner.commit(batch)
    }

    fn load_run<'a>(&'a self, run: &'a RunId) -> BoxFuture<'a, Result<Option<RunState>, StoreError>> {
        self.inner.load_run(run)
    }

    fn list_runs<'a>(&'a self, query: &'a RunQuery) -> BoxFuture<'a, Result<RunPage, StoreError>> {
        self.inner.list_runs(query)
    }

    fn list_leases(&self) -> BoxFuture<'_, Result<Vec<LeaseRecord>, StoreError>> {
        self.inner.list_leases()
    }

    fn lease_store(&self) -> LeaseStore {
        self.inner.lease_store()
    }

    fn reserve_tokens(&self, count: u64) -> BoxFuture<'_, Result<Range<u64>, StoreError>> {
        self.inner.reserve_tokens(count)
    }

    fn retained(&self) -> BoxFuture<'_, Result<Vec<(NodeId, Retained)>, StoreError>> {
        self.inner.retained()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        self.disk.lock().unwrap().append(&mut self.in_memory.lock().unwrap());
        self.inner.close()
    }
}

/// Opens a liar; every opening is of the same store, save for the one that forgets.
struct LiarHarness(MemoryBackend, Lie, Disk);

impl LiarHarness {
    fn new(lie: Lie) -> Self {
        Self(MemoryBackend::new(), lie, Disk::default())
    }
}

impl Harness for LiarHarness {
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>> {
        if self.1 == Lie::WritesOnlyWhenItIsClosed {
            let disk = Arc::clone(&self.2);
            let unwritten = Unwritten { inner: MemoryBackend::new(), disk, in_memory: Mutex::default() };
            return Box::pin(async { Ok(Arc::new(unwritten) as Arc<dyn StateBackend>) });
        }
        let inner = if self.1 == Lie::ForgetsOnReopening { MemoryBackend::new() } else { self.0.clone() };
        let liar = Liar { inner, lie: self.1 };
        let backend: Arc<dyn StateBackend> =
            if self.1 == Lie::ReadsRunsOneByOne { Arc::new(OneByOne(liar)) } else { Arc::new(liar) };
        Box::pin(async move { Ok(backend) })
    }
}

#[tokio::test]
async fn every_lie_is_seen() {
    for (lie, case) in [
        (Lie::ForgetsGuards, "run_guards_hold_or_refuse"),
        (Lie::ForgetsGuards, "node_guards_hold_or_refuse"),
        (Lie::ForgetsFences, "a_lost_lease_fences"),
        (Lie::ForgetsFences, "an_expired_lease_fences"),
        (Lie::ForgetsBatchIds, "a_batch_is_applied_once"),
        (Lie::ForgetsBatchIds, "a_dropped_commit_leaves_the_store_whole"),
        (Lie::ForgetsRefusedChains, "a_refusal_chains_its_own_run_only"),
        (Lie::SplitsEntriesOverRuns, "several_runs_are_all_or_nothing"),
        (Lie::NeverFindsStale, "a_newer_row_makes_stale"),
        (Lie::NeverFindsStale, "random_operations_match_the_model"),
        (Lie::AlwaysFindsStale, "other_rows_do_not_disturb"),
        (Lie::OverwritesStrangersRows, "other_rows_do_not_disturb"),
        (Lie::KeepsNoCoverage, "deleting_keeps_coverage_only_if_told"),
        (Lie::KeepsEveryCoverage, "deleting_keeps_coverage_only_if_told"),
        (Lie::RetainsNothing, "retained_history_joins"),
        (Lie::RetainsNothing, "the_last_success_is_found"),
        (Lie::ListsOldestFirst, "runs_are_listed_newest_first"),
        (Lie::IgnoresTheCursor, "pages_visit_every_run_once"),
        (Lie::LosesTheLastPage, "pages_visit_every_run_once"),
        (Lie::MatchesPrefixesInAnyCase, "filters_select"),
        (Lie::RoundsNumbers, "large_numbers_are_exact"),
        (Lie::TrimsIds, "awkward_ids_are_data"),
        (Lie::ReordersForeignText, "foreign_text_is_kept_token_for_token"),
        (Lie::LosesRowVersions, "versions_grow_by_one_and_rows_carry_them"),
        (Lie::StartsVersionsAnew, "versions_are_never_used_again"),
        (Lie::StartsTokensAnew, "tokens_grow_over_reopening"),
        (Lie::StaysOpen, "a_closed_store_refuses"),
        (Lie::ForgetsOnReopening, "reopening_finds_the_same"),
        (Lie::ReadsRunsOneByOne, "several_runs_are_read_at_one_moment"),
        (Lie::ReadsRunsOneByOne, "coverage_is_read_at_one_moment"),
        (Lie::WritesOnlyWhenItIsClosed, "a_crash_loses_nothing_that_was_acknowledged"),
        (Lie::IsNeverSound, "sound_and_checkpointed"),
    ] {
        let verdict = run_case(case, &LiarHarness::new(lie)).await;
        let violation = verdict.expect_err(&format!("{case} does not see that a backend {lie:?}"));
        assert_eq!(violation.case, case);
        assert!(!violation.what.contains("no case of that name"), "{violation}");
    }
}

/// What a backend does not bring itself, the trait provides: slower, and right.
#[tokio::test]
async fn the_provided_methods_conform() {
    let report = run_all(|| LiarHarness::new(Lie::Nothing)).await;
    assert!(report.is_conforming(), "{report}");
}
