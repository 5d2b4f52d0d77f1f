//! Which runs go, and why the others stay; pure.

use std::collections::BTreeSet;

use chrono::{DateTime, Datelike, Utc};
use serde::Serialize;

use crate::model::{NodeStatus, RunId, RunStatus, RunSummary, UnreadableRun, Version};
use crate::project::ProjectError;

/// Which runs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    cutoff: DateTime<Utc>,
    keep_last: u64,
}

impl Rules {
    /// Runs that ended more than this many days before now go, but the newest `keep_last` ended ones stay.
    ///
    /// # Errors
    /// [`ProjectErrorKind::Input`](crate::project::ProjectErrorKind::Input) if that many days ago is before the year 1.
    pub fn older_than_days(days: u64, keep_last: u64, now: DateTime<Utc>) -> Result<Self, ProjectError> {
        let cutoff = i64::try_from(days)
            .ok()
            .and_then(chrono::Duration::try_days)
            .and_then(|age| now.checked_sub_signed(age))
            .filter(|cutoff| (1..=9999).contains(&cutoff.year()));
        let Some(cutoff) = cutoff else {
            let most = now.num_days_from_ce().saturating_sub(1);
            return Err(ProjectError::input(format!("--days {days}: that is before the year 1; give at most {most}")));
        };
        Ok(Self { cutoff, keep_last })
    }

    /// The stamp before which a run must have ended.
    pub fn cutoff(&self) -> DateTime<Utc> {
        self.cutoff
    }
}

/// A run that would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Doomed {
    /// Its name.
    pub run_id: RunId,
    /// Its status.
    pub status: RunStatus,
    /// When it ended.
    pub ended_at: DateTime<Utc>,
    /// Its version; it goes only if it still is at this one.
    pub version: Version,
    /// How many nodes it has.
    pub nodes: u64,
}

/// What would go, and what stays though it is old.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// What goes, newest first.
    pub delete: Vec<Doomed>,
    /// Runs that stay because they, or nodes of theirs, are locked.
    pub locked: Vec<RunId>,
    /// Ended runs that stay because nothing says when they ended.
    pub without_stamp: Vec<RunId>,
    /// Runs that stay because they cannot be read, in the listing or where that was needed to know when they ended.
    pub unreadable: Vec<Stays>,
    /// Runs in a status of the end, without a stamp of it, that stay because nodes of theirs run.
    pub nodes_running: Vec<RunId>,
    /// How many stay because they run or wait.
    pub running: u64,
    /// How many stay because they did not end that long ago.
    pub recent: u64,
    /// How many stay because they are among the newest ended ones.
    pub kept_last: u64,
    /// How many runs stay by the rules: all of these together.
    pub kept: u64,
}

/// A run that stays for a fault of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stays {
    /// Its name, as it is stored.
    pub run_id: String,
    /// What the storage says of it.
    pub reason: String,
}

impl Stays {
    pub(super) fn new(run_id: &RunId, reason: impl ToString) -> Self {
        Self { run_id: run_id.to_string(), reason: reason.to_string() }
    }
}

/// Judges one run after another, newest first; pure.
#[derive(Debug)]
pub(super) struct Judge {
    rules: Rules,
    locked: BTreeSet<RunId>,
    ended: u64,
    plan: Plan,
}

impl Judge {
    /// A judge who knows the rules and which runs have leases.
    pub(super) fn new(rules: Rules, locked: BTreeSet<RunId>) -> Self {
        Self { rules, locked, ended: 0, plan: Plan::default() }
    }

    /// Whether the run's own header does not say when it ended, so that its newest stamp is needed.
    pub(super) fn needs_stamp(summary: &RunSummary) -> bool {
        has_ended(summary) && summary.header.finished_at.is_none()
    }

    /// Judges a run. `newest` is the newest stamp in it, where [`needs_stamp`](Self::needs_stamp) asked for it.
    pub(super) fn see(&mut self, summary: &RunSummary, newest: Option<DateTime<Utc>>) {
        if !has_ended(summary) {
            self.plan.kept += 1;
            if is_under_way(summary) {
                self.plan.running += 1;
            } else {
                self.plan.nodes_running.push(summary.run_id.clone());
            }
            return;
        }
        self.ended += 1;
        let Some(ended_at) = summary.header.finished_at.or(newest) else {
            self.plan.without_stamp.push(summary.run_id.clone());
            return;
        };
        let is_last = self.ended <= self.rules.keep_last;
        if is_last || ended_at >= self.rules.cutoff {
            self.plan.kept += 1;
            *(if is_last { &mut self.plan.kept_last } else { &mut self.plan.recent }) += 1;
        } else if self.locked.contains(&summary.run_id) {
            self.plan.locked.push(summary.run_id.clone());
        } else {
            self.plan.delete.push(Doomed {
                run_id: summary.run_id.clone(),
                status: summary.header.status.clone(),
                ended_at,
                version: summary.version,
                nodes: summary.nodes.values().sum(),
            });
        }
    }

    /// A run that has ended and cannot be read stays.
    pub(super) fn cannot_see(&mut self, summary: &RunSummary, why: impl ToString) {
        self.ended += 1;
        self.plan.unreadable.push(Stays::new(&summary.run_id, why));
    }

    /// Nor goes one of which nothing can be read.
    pub(super) fn cannot_list(&mut self, run: UnreadableRun) {
        self.plan.unreadable.push(Stays { run_id: run.run_id, reason: run.reason });
    }

    /// The plan.
    pub(super) fn into_plan(self) -> Plan {
        self.plan
    }
}

/// Statuses of other systems count as ended: only what is known to be waiting or at work stays. The status of a run that does not say when it ended may be
/// what its nodes tell, one of which failed: it is at work as long as another one runs.
fn has_ended(summary: &RunSummary) -> bool {
    let at_work =
        || summary.header.finished_at.is_none() && summary.nodes.get(&NodeStatus::Running).is_some_and(|nodes| *nodes > 0);
    !is_under_way(summary) && !at_work()
}

fn is_under_way(summary: &RunSummary) -> bool {
    matches!(summary.header.status, RunStatus::Pending | RunStatus::Running)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{RunHeader, time};
    use crate::project::ProjectErrorKind;

    fn day(day: u32) -> DateTime<Utc> {
        time::parse(&format!("2024-01-{day:02}T00:00:00Z")).unwrap()
    }

    #[test]
    fn the_judge() {
        let rules = Rules::older_than_days(10, 1, day(25)).unwrap();
        let mut judge = Judge::new(rules, BTreeSet::new());
        let summary = |id: &str, status: &str, finished: Option<DateTime<Utc>>| {
            let mut header = RunHeader::new(RunStatus::parse(status), day(1));
            header.finished_at = finished;
            RunSummary::new(RunId::new(id).unwrap(), Version(1), header, [].into())
        };
        judge.see(&summary("kept as the last", "success", Some(day(2))), None);
        judge.see(&summary("edge", "failed", Some(day(15))), None);
        judge.see(&summary("over the edge", "failed", Some(day(14))), None);
        judge.see(&summary("pending", "pending", None), None);
        let foreign = summary("foreign", "upstream_failed", None);
        assert!(Judge::needs_stamp(&foreign));
        judge.see(&foreign, Some(day(3)));
        judge.see(&summary("no stamp", "success", None), None);
        let plan = judge.into_plan();
        assert_eq!(plan.delete.iter().map(|doomed| doomed.run_id.as_str()).collect::<Vec<_>>(), ["over the edge", "foreign"]);
        assert_eq!(plan.without_stamp.iter().map(RunId::as_str).collect::<Vec<_>>(), ["no stamp"]);
        assert_eq!(plan.kept, 3);
    }

    #[test]
    fn days_beyond_the_calendar_are_refused() {
        for days in [u64::MAX, 1 << 40, 800_000] {
            let error = Rules::older_than_days(days, 0, day(25)).unwrap_err();
            assert_eq!(error.kind(), ProjectErrorKind::Input);
            assert!(error.to_string().contains(&days.to_string()));
        }
        assert_eq!(Rules::older_than_days(0, 0, day(25)).unwrap().cutoff(), day(25));
    }
}
