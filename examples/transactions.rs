//! Transactions: all or nothing, over one run or several, with conditions; and what each kind of refusal looks like.
//!
//! ```text
//! cargo run --example transactions
//! ```

#![expect(clippy::print_stdout, reason = "an example tells its user what happens")]

use std::error::Error as StdError;
use std::time::Duration;

use seeknal_state::{BackendOptions, Coordinator, Error, NewRun, NodeStatus, NodeUpdate, create_state_backend};

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    let folder = tempfile::tempdir()?;
    // Without the feature `file` the same runs in memory.
    let name = if cfg!(feature = "file") { "file" } else { "memory" };
    let state =
        Coordinator::open(create_state_backend(name, &BackendOptions::new().base_path(folder.path().join("target")))?).await?;
    for run in ["monday", "tuesday"] {
        state.create_run(run, NewRun::running()).await?;
    }

    all_or_nothing(&state).await?;
    with_conditions(&state).await?;
    read_decide_commit(&state).await?;
    under_a_lock(&state).await?;
    state.close().await?;
    Ok(())
}

async fn all_or_nothing(state: &Coordinator) -> Result<(), Error> {
    let mut tx = state.transaction();
    tx.set_node_state("monday", "orders", NodeUpdate::success().row_count(1_000));
    tx.add_completed_interval("monday", "orders", ("2024-01-01", "2024-01-02"));
    tx.set_node_state("tuesday", "orders", NodeUpdate::running());
    let commit = tx.commit().await?;
    let runs: Vec<String> = commit.runs.iter().map(|run| format!("{} at version {}", run.run, run.after)).collect();
    println!("two runs, one transaction: {}", runs.join(", "));

    let mut tx = state.transaction();
    tx.set_node_state("monday", "orders", NodeUpdate::failed("never said"));
    drop(tx);
    let orders = state.get_node_state("monday", "orders").await?;
    println!("dropped, so rolled back: orders is {}", status(orders.as_ref().map(|node| &node.status)));

    let mut tx = state.transaction();
    tx.set_node_state("monday", "orders", NodeUpdate::failed("never said"));
    tx.set_node_state("wednesday", "orders", NodeUpdate::running());
    match tx.commit().await {
        Err(error @ Error::RunNotFound(_)) => println!("one half is impossible, so nothing happens: {error}"),
        other => println!("unexpected: {other:?}"),
    }
    Ok(())
}

async fn with_conditions(state: &Coordinator) -> Result<(), Error> {
    let seen = state.get_run("monday").await?.ok_or(Error::Closed)?;
    // Somebody else writes in between.
    state.set_node_state("monday", "customers", NodeUpdate::running()).await?;

    let mut tx = state.transaction();
    tx.expect_version("monday", seen.version());
    tx.set_node_state("monday", "report", NodeUpdate::running());
    match tx.commit().await {
        Err(error) if error.is_conflict() => println!("{error}"),
        other => println!("unexpected: {other:?}"),
    }

    // Looks only at what it needs, so that the other writer is no conflict.
    let mut tx = state.transaction();
    tx.expect_status("monday", "orders", [NodeStatus::Success]);
    tx.expect_absent("monday", "report");
    tx.set_node_state("monday", "report", NodeUpdate::running());
    println!("conditions on nodes hold: version {}", tx.commit().await?.version());
    Ok(())
}

async fn read_decide_commit(state: &Coordinator) -> Result<(), Error> {
    let counters = (0..10).map(|_| {
        let state = state.clone();
        tokio::spawn(async move {
            let count = state.transact(|view, tx| {
                let run = view.run("tuesday")?;
                let count = run.and_then(|run| run.node("count")?.row_count).unwrap_or(0) + 1;
                tx.set_node_state("tuesday", "count", NodeUpdate::running().row_count(count));
                Ok(count)
            });
            count.await.map(|(count, _)| count)
        })
    });
    for counter in counters.collect::<Vec<_>>() {
        counter.await.map_err(|_| Error::Closed)??;
    }
    let count = state.get_node_state("tuesday", "count").await?.and_then(|node| node.row_count).unwrap_or(0);
    println!("ten tasks counted to {count}");
    Ok(())
}

async fn under_a_lock(state: &Coordinator) -> Result<(), Error> {
    let Some(lease) = state.acquire_lock("tuesday", Duration::from_secs(5)).await? else {
        println!("tuesday is locked by somebody else");
        return Ok(());
    };
    let fenced = state.with_lease(&lease);
    fenced.set_node_state("tuesday", "orders", NodeUpdate::success()).await?;
    // An operator takes the lock away (`seeknal state unlock TOKEN`).
    state.force_unlock(lease.token()).await?;
    match fenced.set_node_state("tuesday", "orders", NodeUpdate::failed("too late")).await {
        Err(error @ Error::LeaseLost(_)) => println!("the lock is lost: {error}"),
        other => println!("unexpected: {other:?}"),
    }
    let orders = state.get_node_state("tuesday", "orders").await?;
    println!("so orders is still {}", status(orders.as_ref().map(|node| &node.status)));
    Ok(())
}

fn status(status: Option<&NodeStatus>) -> &str {
    status.map_or("not there", NodeStatus::as_str)
}
