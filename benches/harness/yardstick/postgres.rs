//! A loop on one connection to PostgreSQL that writes rows in transactions of a fixed size: no actors, no checks, no acknowledgements.
//!
//! The server is one of the harness's own, as the tests have it: `apt-get install postgresql`.

use std::path::Path;
use std::time::Duration;

use seeknal_state::BackendOptions;
use tokio::runtime::{Handle, Runtime};
use tokio_postgres::{Client, NoTls, Statement};

use crate::measure::{Contender, Dice, Sample, steadily};
use crate::plan::Backend;
use crate::servers;
use crate::workload::{self, Field, NODES, RUNS};
use crate::{Fault, Outcome};

#[path = "../../../tests/support/postgres.rs"]
mod server;

/// What our backend writes for nodes, but for the columns that are empty here.
const PUT_NODES: &str = "INSERT INTO node_states (run_id, node_id, status, attempt, finished_at, row_count, version, run_created_at) \
     SELECT run_id, node_id, 'success', 1, clock_timestamp(), row_count::numeric, version, clock_timestamp() \
     FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) AS k (run_id, node_id, row_count, version) \
     ON CONFLICT (run_id, node_id) DO UPDATE SET status = excluded.status, attempt = excluded.attempt, finished_at = excluded.finished_at, \
     row_count = excluded.row_count, version = excluded.version";
const PUT_VERSIONS: &str = "UPDATE runs AS r SET version = k.version FROM unnest($1::text[], $2::bigint[]) AS k (run_id, version) \
     WHERE r.run_id = k.run_id";
const PUT_BATCH: &str = "INSERT INTO batches (id, at, answers) VALUES ($1, clock_timestamp(), $2)";

/// The schema that belongs to a folder of the harness, on the server that all share.
fn schema(folder: &Path) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let name: String = folder.to_string_lossy().chars().map(plain).collect();
    let tail = name.len().saturating_sub(40);
    format!("bench{}", name.get(tail..).unwrap_or_default())
}

fn cluster() -> Outcome<&'static server::Cluster> {
    server::cluster().ok_or_else(|| format!("servers are left out by {}", servers::VARIABLE).into())
}

/// Options for the schema of a folder.
pub(crate) fn schema_of(folder: &Path) -> Outcome<BackendOptions> {
    Ok(BackendOptions::new().database_url(cluster()?.url("?sslmode=disable")).set("database_schema", schema(folder)))
}

/// The loop.
pub(crate) struct RawPostgres {
    runtime: Handle,
    client: Client,
    statements: [Statement; 3],
    field: Field,
    batch: usize,
    version: i64,
    dice: Dice,
}

impl RawPostgres {
    pub(crate) fn open(runtime: &Runtime, folder: &Path, batch: usize) -> Outcome<Self> {
        let field = Field::new(RUNS, NODES)?;
        let (client, statements) = runtime.block_on(async {
            let state = workload::open(Backend::Postgres, folder).await?;
            field.sow(&state).await?;
            state.close().await?;
            let (client, connection) = tokio_postgres::connect(&cluster()?.url("?sslmode=disable"), NoTls).await?;
            drop(tokio::spawn(connection));
            client.batch_execute(&format!("SET search_path = {}; SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off", schema(folder))).await?;
            let statements =
                [client.prepare(PUT_NODES).await?, client.prepare(PUT_VERSIONS).await?, client.prepare(PUT_BATCH).await?];
            Ok::<_, Fault>((client, statements))
        })?;
        Ok(Self { runtime: runtime.handle().clone(), client, statements, field, batch, version: 1_000_000, dice: Dice::new(7) })
    }

    fn transaction(&mut self) -> Outcome<u64> {
        let mut picked: Vec<(usize, usize)> = (0..self.batch).map(|_| (self.dice.below(RUNS), self.dice.below(NODES))).collect();
        picked.sort_unstable();
        picked.dedup();
        self.version += i64::try_from(self.batch)?;
        let runs: Vec<&str> = picked.iter().filter_map(|(run, _)| Some(self.field.runs.get(*run)?.as_str())).collect();
        let nodes: Vec<&str> = picked.iter().filter_map(|(_, node)| Some(self.field.nodes.get(*node)?.as_str())).collect();
        let counts: Vec<String> = picked.iter().map(|_| (self.dice.next() >> 24).to_string()).collect();
        let versions = vec![self.version; picked.len()];
        let mut heads = runs.clone();
        heads.dedup();
        let head_versions = vec![self.version; heads.len()];
        let (id, answer) = (uuid::Uuid::now_v7(), vec![1_u8; 1 + 5 * self.batch]);
        let [put_nodes, put_versions, put_batch] = &self.statements;
        let client = &self.client;
        self.runtime.block_on(async {
            // All sent at once, as our backend does.
            let nodes_params: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [&runs, &nodes, &counts, &versions];
            let heads_params: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&heads, &head_versions];
            let batch_params: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&id, &answer];
            tokio::try_join!(
                async { client.batch_execute("BEGIN").await.map(|()| 0) },
                client.execute(put_nodes, &nodes_params),
                client.execute(put_versions, &heads_params),
                client.execute(put_batch, &batch_params),
                async { client.batch_execute("COMMIT").await.map(|()| 0) },
            )
        })?;
        Ok(u64::try_from(self.batch)?)
    }
}

impl Contender for RawPostgres {
    fn round(&mut self, lasting: Duration) -> Outcome<Sample> {
        steadily(lasting, || self.transaction())
    }
}
