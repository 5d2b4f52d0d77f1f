//! The public test kit that every backend must pass: the built-in ones, and a user's own.
//!
//! A backend brings a [`Harness`], which opens one store as often as it is asked; the kit brings the [`cases`]. Each case opens a store of its own
//! and answers with a typed [`Violation`], so that it can run inside any test framework. [`conformance_tests!`](crate::conformance_tests) makes one
//! `#[tokio::test]` of every case:
//!
//! ```ignore
//! seeknal_state::conformance_tests!(memory, MemoryHarness::new());
//! ```
//!
//! Only what the contract of [`StateBackend`] says is asked for: where a backend starts its sequence, how it spaces its tokens
//! and in which words it refuses are its own business. A batch that is answered with [`Unavailable`](super::StoreErrorKind::Unavailable) is sent again a few
//! times, as the coordinator does. The entries are made as run actors make them: see [`Chain`].

mod chain;
mod chains;
mod concurrency;
mod fidelity;
mod guards;
mod kit;
mod leases;
mod lifecycle;
mod queries;
mod random;

use std::fmt;
use std::sync::Arc;

use super::{BoxFuture, StateBackend, StoreError};

pub use chain::Chain;
use kit::Fault;

/// Opens one store for a case.
pub trait Harness: Send + Sync {
    /// Makes the backend; the kit initialises it. The first call finds a fresh and empty storage; every later one the same storage again. What the call
    /// before gave is closed or gone by then; where the backend says that it [is shared](StateBackend::is_shared) it may still be open.
    ///
    /// # Errors
    /// [`StoreError`] if the backend cannot be made; the case fails with it.
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn StateBackend>, StoreError>>;

    /// Ends an opening as the death of its process would: without [`close`](StateBackend::close), after which [`open`](Self::open) is called again. The default
    /// drops it. A backend that writes something when it is dropped, or whose threads go on after it, is ended here in a harder way; one that is still busy ending
    /// by itself may refuse the next opening as busy for a while.
    fn crash(&self, backend: Arc<dyn StateBackend>) -> BoxFuture<'_, ()> {
        drop(backend);
        Box::pin(std::future::ready(()))
    }
}

/// A promise of the contract that a backend did not keep.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{case}: {what}")]
#[non_exhaustive]
pub struct Violation {
    /// The case that saw it.
    pub case: &'static str,
    /// What was expected, and what happened.
    pub what: String,
}

type CaseFn = for<'h> fn(&'h dyn Harness) -> BoxFuture<'h, Result<(), Fault>>;

/// One promise, and how it is checked.
#[derive(Clone, Copy)]
pub struct Case {
    name: &'static str,
    check: CaseFn,
}

impl Case {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Checks it on a store of its own: the harness must not have opened anything yet.
    ///
    /// # Errors
    /// [`Violation`] if the backend does not keep the promise, or fails.
    ///
    /// # Cancel safety
    /// Dropping the future ends the case; the backend is dropped without being closed.
    pub async fn run(&self, harness: &dyn Harness) -> Result<(), Violation> {
        (self.check)(harness).await.map_err(|fault| Violation { case: self.name, what: fault.into_text() })
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What became of all cases.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// The names of the cases that passed.
    pub passed: Vec<&'static str>,
    /// What was not kept.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Whether every promise was kept.
    pub fn is_conforming(&self) -> bool {
        self.violations.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed.len(), self.violations.len())?;
        self.violations.iter().try_for_each(|violation| write!(f, "\n{violation}"))
    }
}

/// Runs all cases, each on a harness of its own.
///
/// # Cancel safety
/// Dropping the future ends the case that runs; its backend is dropped without being closed.
pub async fn run_all<H: Harness>(harness: impl Fn() -> H) -> Report {
    let mut report = Report::default();
    for case in cases() {
        match case.run(&harness()).await {
            Ok(()) => report.passed.push(case.name),
            Err(violation) => report.violations.push(violation),
        }
    }
    report
}

/// Runs the case of that name.
///
/// # Errors
/// [`Violation`] as [`Case::run`], or if there is no such case.
///
/// # Cancel safety
/// As [`Case::run`].
pub async fn run_case(name: &'static str, harness: &dyn Harness) -> Result<(), Violation> {
    match cases().into_iter().find(|case| case.name == name) {
        Some(case) => case.run(harness).await,
        None => Err(Violation { case: name, what: "there is no case of that name".to_owned() }),
    }
}

/// Makes the list of cases, and the macro that makes a test of each, from one table. `$d` is a dollar sign for the inner macro.
macro_rules! suite {
    ($d:tt $($room:ident: $($name:ident),+;)+) => {
        /// All cases.
        pub fn cases() -> Vec<Case> {
            vec![$($(Case { name: stringify!($name), check: |harness| Box::pin($room::$name(harness)) }),+),+]
        }

        /// Makes a module with one `#[tokio::test]` for every case of the [conformance suite](crate::store::conformance): the name of the module, and
        /// an expression that makes a fresh [`Harness`](crate::store::conformance::Harness). Needs tokio with its feature `macros`.
        #[macro_export]
        macro_rules! conformance_tests {
            ($d store:ident, $d harness:expr) => {
                mod $d store {
                    #[allow(unused_imports, reason = "the harness may be written without anything from outside")]
                    use super::*;
                    $($(
                        #[tokio::test]
                        async fn $name() {
                            let harness = $d harness;
                            if let Err(violation) = $d crate::store::conformance::run_case(stringify!($name), &harness).await {
                                panic!("{violation}");
                            }
                        }
                    )+)+
                }
            };
        }
    };
}

suite! { $
    lifecycle:
        a_fresh_store_is_empty,
        a_run_is_created_once,
        a_run_is_imported_whole,
        every_mutation_is_stored,
        removing_from_a_node_that_is_not_there_makes_none,
        every_node_field_is_stored,
        versions_grow_by_one_and_rows_carry_them,
        versions_are_never_used_again,
        what_is_missing_is_refused,
        an_entry_that_makes_no_sense_is_refused,
        the_sequence_grows_with_every_entry;
    guards:
        run_guards_hold_or_refuse,
        node_guards_hold_or_refuse,
        guards_on_a_run_that_is_made_look_at_nothing,
        a_guard_alone_needs_its_run,
        a_refused_entry_changes_nothing;
    chains:
        a_chain_is_applied_in_order,
        a_refusal_chains_its_own_run_only,
        a_newer_row_makes_stale,
        other_rows_do_not_disturb,
        a_chain_on_an_old_base_may_touch_its_own_rows,
        a_deleted_row_makes_stale_where_others_write,
        a_deletion_hides_no_other,
        several_runs_are_all_or_nothing,
        a_batch_is_applied_once,
        an_empty_batch_is_answered,
        a_big_batch_is_answered_entry_by_entry;
    leases:
        a_lost_lease_fences,
        an_expired_lease_fences,
        unlocked_means_no_lease,
        tokens_grow_over_reopening,
        tokens_are_raised_for_good,
        held_leases_are_listed,
        run_and_node_leases_exclude_one_another,
        leases_are_renewed_released_and_forced,
        leases_travel_with_writes,
        a_lease_that_is_given_back_with_a_write_is_void_behind_it,
        the_end_of_a_run_frees_its_leases,
        a_run_that_ends_is_unlocked_for_what_follows,
        a_grant_before_the_end_of_its_run_is_refused_where_it_is_held;
    queries:
        runs_are_listed_newest_first,
        filters_select,
        pages_visit_every_run_once,
        summaries_count_nodes,
        the_latest_node_is_that_of_the_newest_run,
        the_last_success_is_found,
        coverage_is_the_union_over_runs,
        deleting_keeps_coverage_only_if_told,
        deleting_keeps_what_its_own_entry_did,
        the_later_deletion_of_one_run_tells_its_success,
        retained_history_joins,
        reloading_finds_the_present_state;
    fidelity:
        foreign_text_is_kept_token_for_token,
        attempts_are_kept_as_history,
        what_is_cleared_is_gone,
        large_numbers_are_exact,
        unknown_statuses_are_kept,
        awkward_ids_are_data,
        ids_never_run_together,
        many_islands_are_exact,
        stamps_are_exact,
        reopening_finds_the_same,
        a_crash_loses_nothing_that_was_acknowledged;
    concurrency:
        runs_do_not_disturb_one_another,
        several_runs_are_read_at_one_moment,
        coverage_is_read_at_one_moment,
        a_dropped_commit_leaves_the_store_whole,
        a_closed_store_refuses,
        sound_and_checkpointed;
    random:
        random_operations_match_the_model;
}
