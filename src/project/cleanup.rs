//! Deleting old runs, without ever making a done interval pending again.

mod deleting;
mod judge;

use super::ProjectError;
use crate::model::RunQuery;
use crate::store::StateBackend;

pub use deleting::{Cleaned, execute, through};
use judge::Judge;
pub use judge::{Doomed, Plan, Rules, Stays};

/// Runs in one page of the listing.
const PAGE: usize = 500;

/// Looks at all runs and says what would go. Only reads; memory holds the names of what goes.
///
/// # Errors
/// Whatever reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn plan(backend: &dyn StateBackend, rules: Rules) -> Result<Plan, ProjectError> {
    let locked = backend.list_leases().await?.into_iter().map(|lease| lease.key.run).collect();
    let mut judge = Judge::new(rules, locked);
    let mut query = RunQuery::default().limit(PAGE).naming_unreadable();
    loop {
        let page = backend.list_runs(&query).await?;
        page.unreadable.into_iter().for_each(|run| judge.cannot_list(run));
        for summary in &page.runs {
            let newest = if Judge::needs_stamp(summary) {
                match backend.load_run(&summary.run_id).await {
                    Ok(run) => run.and_then(|run| run.newest_stamp()),
                    Err(error) if error.is_of_one_entry() => {
                        judge.cannot_see(summary, error);
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
            } else {
                None
            };
            judge.see(summary, newest);
        }
        if page.next.is_none() {
            return Ok(judge.into_plan());
        }
        query = query.after(page.next);
    }
}

/// Reads what would go, and takes out of the plan what cannot be read: a cleanup would leave it and name it. Without this a plan knows it of runs only that do
/// not say themselves when they ended.
///
/// # Errors
/// Whatever else reading meets.
///
/// # Cancel safety
/// Only reads: may be dropped at any time.
pub async fn read_through(backend: &dyn StateBackend, plan: &mut Plan) -> Result<(), ProjectError> {
    let mut doomed = Vec::with_capacity(plan.delete.len());
    for run in std::mem::take(&mut plan.delete) {
        match backend.load_run(&run.run_id).await {
            Err(error) if error.is_of_one_entry() => plan.unreadable.push(Stays::new(&run.run_id, error)),
            read => {
                read?;
                doomed.push(run);
            }
        }
    }
    plan.delete = doomed;
    Ok(())
}
#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use chrono::{DateTime, Utc};

    use super::*;
    use crate::model::{
        Batch, Entry, FencingToken, Interval, LeaseKey, LeaseOwner, LeaseRecord, Mutation, NewRun, NodeId, NodeUpdate, Outcome,
        ProcessInfo, RunId, RunPart, RunUpdate, Version, time,
    };
    use crate::project::migrate::commit;
    use crate::store::{LeaseStore, MemoryBackend};

    fn day(day: u32) -> DateTime<Utc> {
        time::parse(&format!("2024-01-{day:02}T00:00:00Z")).unwrap()
    }

    async fn put(backend: &Arc<dyn StateBackend>, run: &str, mutations: Vec<Mutation>) {
        let run = RunId::new(run).unwrap();
        let version = backend.run_version(&run).await.unwrap().unwrap_or(Version::NONE);
        let part = RunPart { run, base: version, expect: version, guards: vec![], mutations, after: None };
        let outcomes = commit(&**backend, Batch::new(vec![Entry { parts: vec![part], ..Entry::default() }])).await.unwrap();
        assert!(matches!(outcomes[0], Outcome::Applied(_)), "{outcomes:?}");
    }

    fn create(at: DateTime<Utc>) -> Mutation {
        Mutation::Create { run: NewRun::running(), at }
    }

    fn end(at: DateTime<Utc>) -> Mutation {
        Mutation::Update { update: RunUpdate::success(), at }
    }

    fn ids(runs: &[RunId]) -> Vec<&str> {
        runs.iter().map(RunId::as_str).collect()
    }

    async fn filled() -> Arc<dyn StateBackend> {
        let backend: Arc<dyn StateBackend> = Arc::new(MemoryBackend::new());
        let node = NodeId::new("n").unwrap();
        let interval = Interval::parse("2023-01-01", "2023-01-02").unwrap();
        put(
            &backend,
            "old",
            vec![
                create(day(1)),
                Mutation::SetNode { node: node.clone(), update: Box::new(NodeUpdate::success().row_count(7)), at: day(1) },
                Mutation::AddInterval { node, interval },
                end(day(2)),
            ],
        )
        .await;
        put(&backend, "old2", vec![create(day(2)), end(day(2))]).await;
        put(&backend, "running", vec![create(day(1))]).await;
        put(&backend, "young", vec![create(day(20)), end(day(20))]).await;
        backend
    }

    #[tokio::test]
    async fn old_ended_runs_go_and_what_they_completed_stays() {
        let backend = filled().await;
        let rules = Rules::older_than_days(10, 0, day(25)).unwrap();
        let plan = plan(&*backend, rules).await.unwrap();
        assert_eq!(plan.delete.iter().map(|doomed| doomed.run_id.as_str()).collect::<Vec<_>>(), ["old2", "old"]);
        assert_eq!(plan.kept, 2);
        let node = NodeId::new("n").unwrap();
        let (coverage, success) = (backend.coverage(&node).await.unwrap(), backend.last_success(&node).await.unwrap());
        assert!(success.is_some() && !coverage.is_empty());
        let cleaned = execute(&backend, &plan).await.unwrap();
        assert_eq!(cleaned, Cleaned { deleted: 2, ..Cleaned::default() });
        assert_eq!(backend.coverage(&node).await.unwrap(), coverage);
        assert_eq!(backend.last_success(&node).await.unwrap(), success);
        assert_eq!(backend.list_runs(&RunQuery::default()).await.unwrap().runs.len(), 2);
        assert_eq!(execute(&backend, &plan).await.unwrap().deleted, 0, "a second time there is nothing to do");
    }

    #[tokio::test]
    async fn runs_that_changed_or_were_locked_meanwhile_stay() {
        let backend = filled().await;
        let plan = plan(&*backend, Rules::older_than_days(0, 0, day(25)).unwrap()).await.unwrap();
        assert_eq!(plan.delete.len(), 3);
        put(&backend, "old", vec![Mutation::Update { update: RunUpdate::running(), at: day(25) }]).await;
        let LeaseStore::Book(book) = backend.lease_store() else { panic!("memory keeps a book") };
        let owner = LeaseOwner { process: ProcessInfo::current(day(25)), name: Arc::from("someone") };
        let key = LeaseKey::run(RunId::new("old2").unwrap());
        book.put(LeaseRecord::new(key, FencingToken(1), owner, None, day(25), 1000), None);
        let cleaned = execute(&backend, &plan).await.unwrap();
        assert_eq!(cleaned.deleted, 1);
        assert_eq!(ids(&cleaned.changed_meanwhile), ["old2", "old"]);
        let again = super::plan(&*backend, Rules::older_than_days(0, 0, day(25)).unwrap()).await.unwrap();
        assert_eq!(ids(&again.locked), ["old2"]);
        assert!(again.delete.is_empty());
    }
}
