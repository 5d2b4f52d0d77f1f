//! What listings tell of runs that cannot be read.

use std::collections::BTreeSet;

use seeknal_state::model::{RunFilter, RunQuery};
use seeknal_state::store::StoreErrorKind;

use super::batches::Backend;

/// What all pages of so many runs tell: the runs that can be read, newest first, each with one node; and the names of the others, each told once.
pub(crate) async fn listed(backend: &Backend, filter: &RunFilter, limit: usize) -> (Vec<String>, BTreeSet<String>) {
    let mut query = RunQuery::new(filter.clone()).limit(limit).naming_unreadable();
    let (mut runs, mut unreadable) = (Vec::new(), BTreeSet::new());
    loop {
        let page = backend.list_runs(&query).await.unwrap();
        assert!(page.runs.len() <= limit);
        for run in page.runs {
            assert_eq!(run.nodes.values().sum::<u64>(), 1, "{}", run.run_id);
            runs.push(run.run_id.to_string());
        }
        for run in page.unreadable {
            assert!(run.reason.contains("table "), "{run:?}");
            assert!(unreadable.insert(run.run_id.clone()), "{run:?} is told twice");
        }
        let Some(next) = page.next else { return (runs, unreadable) };
        query = query.after(Some(next));
    }
}

/// The same on pages of every length; who does not ask for them is told that there is one.
pub(crate) async fn assert_listed(backend: &Backend, limits: &[usize], runs: &[String], unreadable: &[String]) {
    let all = RunFilter::all();
    for limit in limits {
        let (found, named) = listed(backend, &all, *limit).await;
        assert!(found == runs, "{limit}: {} instead of {}: {found:?}", found.len(), runs.len());
        assert_eq!(named, unreadable.iter().cloned().collect(), "{limit}");
    }
    let mut none = RunQuery::default().naming_unreadable();
    none.limit = 0;
    assert!(backend.list_runs(&none).await.unwrap().runs.len() <= 1, "a page has at least one run, where there is one");
    let mut query = RunQuery::default().limit(1_000);
    let error = loop {
        match backend.list_runs(&query).await {
            Ok(page) => query = query.after(Some(page.next.unwrap())),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{error}");
}

/// Whoever checks the database is told of all of them, too.
pub(crate) async fn assert_verified(backend: &Backend, unreadable: &[String]) {
    let problems = backend.verify().await.unwrap().problems;
    for name in unreadable {
        // What cannot be shown of a name is not shown alike everywhere.
        let begin = name.split(['\n', '\u{fffd}']).next().unwrap();
        assert!(problems.iter().any(|problem| problem.contains(begin)), "{name:?}: {problems:#?}");
    }
}

/// Names of runs, from the newest to the oldest.
pub(crate) fn names(numbers: impl IntoIterator<Item = usize>) -> Vec<String> {
    numbers.into_iter().map(|number| format!("run{number:0>4}")).collect()
}
