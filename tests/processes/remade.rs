//! A run that another process deletes and makes anew under its name: what was meant for the one that is gone never happens to the other.

use seeknal_state::{NewRun, NodeUpdate, OnDelete, Transaction, View};

use super::support::Store;

on_every_database!(a_transaction_decides_again_when_another_process_took_away_what_it_read);

/// Its closure is called again, whatever this process has heard of it by then.
async fn a_transaction_decides_again_when_another_process_took_away_what_it_read(store: Store) {
    let (state, other) = (store.open().await, store.open().await);
    for round in 0..12 {
        let (run, remade) = (format!("r{round}"), round % 2 == 0);
        state.create_run(&run, NewRun::running()).await.unwrap();
        state.set_node_state(&run, "n", NodeUpdate::running()).await.unwrap();
        let mut seen = Vec::new();
        let decide = |view: &View, tx: &mut Transaction| {
            let found = view.run(&run)?;
            seen.push(found.as_ref().is_some_and(|run| run.node("n").is_some()));
            if seen.len() == 1 {
                let anew = async {
                    other.delete_run(&run, OnDelete::DropCoverage).await.unwrap();
                    if remade {
                        other.create_run(&run, NewRun::running()).await.unwrap();
                    }
                };
                tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(anew));
            }
            if found.is_none() {
                tx.create_run(&run, NewRun::running());
            }
            tx.set_node_state(&run, "own", NodeUpdate::running());
            Ok(())
        };
        state.transact(decide).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(seen, [true, false], "round {round}");
        let run = state.fresh(&run).await.unwrap().unwrap();
        assert!(run.node("own").is_some() && run.node("n").is_none(), "round {round}");
    }
    other.close().await.unwrap();
    state.close().await.unwrap();
}
