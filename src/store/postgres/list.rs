//! Listing runs: a page with the nodes of each counted by status, which names what cannot be read.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use tokio_postgres::Row;

use super::connection::{Pool, Sql};
use super::rows::{Fields, header_columns, plain, read_plain, stamp};
use crate::model::{NodeStatus, RunPage, RunQuery, RunSummary, UnreadableRun};
use crate::store::StoreError;
use crate::store::columns::At;

/// One page of runs, newest first.
pub(super) async fn list(pool: &Pool, query: &RunQuery) -> Result<RunPage, StoreError> {
    // One more than asked for: whether there is a next page.
    let mut asked = query.limit.saturating_add(1);
    loop {
        if let Some(page) = RunPage::of_rows(list_rows(pool, query, asked).await?, asked, query.limit) {
            return Ok(page);
        }
        asked = asked.saturating_mul(4);
    }
}

/// The first rows of a page: runs, and those that cannot be read if they are asked for.
async fn list_rows(pool: &Pool, query: &RunQuery, most: usize) -> Result<Vec<Result<RunSummary, UnreadableRun>>, StoreError> {
    let filter = &query.filter;
    let statuses: Option<Vec<String>> =
        (!filter.statuses.is_empty()).then(|| filter.statuses.iter().map(|status| plain(status.as_str()).into_owned()).collect());
    let Some([from, before]) = filter.created() else { return Ok(Vec::new()) };
    // No id holds a NUL, and no text of PostgreSQL.
    let prefix = filter.id_prefix.as_deref().unwrap_or_default();
    if prefix.contains('\0') {
        return Ok(Vec::new());
    }
    let last_created: Option<DateTime<Utc>> = query.after.as_ref().map(|cursor| stamp(cursor.created_at));
    // The last character of all: the first page begins with what was created at the end of time, which makes no sense and is told.
    let last_id = query.after.as_ref().map_or("\u{10ffff}", |cursor| cursor.run_id.as_str());
    // Of the run that says that there is a next page no nodes are counted; where others cannot be read it may be the last one of this page.
    let counted = if query.names_unreadable { most } else { query.limit };
    let [most, counted] = [most, counted].map(|rows| i64::try_from(rows).unwrap_or(i64::MAX));
    // All bounds are conditions of the index on creation, given or not.
    let sql = concat!(
        "WITH page AS (SELECT run_id, version, ",
        header_columns!(),
        ", row_number() OVER (ORDER BY created_at DESC, run_id DESC) AS place FROM runs WHERE ($1::text[] IS NULL OR status = ANY($1)) \
         AND created_at >= coalesce($2::timestamptz, '-infinity') AND created_at <= coalesce($3::timestamptz - interval '1 us', 'infinity') \
         AND (created_at, run_id) < (coalesce($5::timestamptz, 'infinity'), $6::text) \
         AND starts_with(run_id, $4::text) ORDER BY created_at DESC, run_id DESC LIMIT $7::bigint) \
         SELECT page.*, c.statuses, c.counts FROM page LEFT JOIN LATERAL (\
         SELECT array_agg(s.status) AS statuses, array_agg(s.count) AS counts \
         FROM (SELECT n.status, count(*) AS count FROM node_states AS n WHERE n.run_id = page.run_id AND page.place <= $8::bigint GROUP BY n.status) AS s) AS c ON true \
         ORDER BY page.created_at DESC, page.run_id DESC"
    );
    let answers = pool
        .read_patiently(vec![Sql::new(
            "table runs",
            sql,
            vec![
                Box::new(statuses),
                Box::new(from),
                Box::new(before),
                Box::new(prefix),
                Box::new(last_created),
                Box::new(last_id),
                Box::new(most),
                Box::new(counted),
            ],
        )])
        .await?;
    let read = |row| match summary(row) {
        Err(error) if query.names_unreadable && error.is_of_one_entry() => {
            let name = Fields::new(row, At::table("runs")).text(0).unwrap_or("?");
            Ok(Err(UnreadableRun::new(name, error)))
        }
        read => read.map(Ok),
    };
    answers.iter().flatten().map(read).collect()
}

fn summary(row: &Row) -> Result<RunSummary, StoreError> {
    let id = Fields::new(row, At::table("runs")).run_id(0)?;
    let fields = Fields::new(row, At::table("runs").run(&id));
    let (version, header) = (fields.version(1)?, fields.header(2)?);
    let statuses: Vec<String> = fields.get::<Option<_>>(11)?.unwrap_or_default();
    let counts: Vec<i64> = fields.get::<Option<_>>(12)?.unwrap_or_default();
    let mut nodes = BTreeMap::new();
    for (status, count) in statuses.iter().zip(counts) {
        let status = read_plain(status).ok_or_else(|| fields.bad(11, "a status makes no sense"))?;
        nodes.insert(NodeStatus::parse(&status), count.unsigned_abs());
    }
    Ok(RunSummary::new(id, version, header, nodes))
}
