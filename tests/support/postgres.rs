//! A PostgreSQL of the tests' own: a cluster in a temporary folder, on a free loopback port, with TLS, stopped again when the test process is gone.
//!
//! It needs Debian's package (`apt-get install postgresql`) and `openssl`; see [`servers`] for what happens without them.
#![allow(dead_code, reason = "every test takes what it needs of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use seeknal_state::BackendOptions;

use super::servers;

/// The password of every role.
pub(crate) const PASSWORD: &str = "s3cret-of-the-tests";

/// A server that runs.
pub(crate) struct Cluster {
    folder: PathBuf,
    bin: PathBuf,
    pub(crate) port: u16,
    /// A shell that waits: when this end of its pipe is closed, also by the death of this process, it stops the server and clears up.
    keeper: Child,
}

/// The cluster that the tests of this process share; `None`: servers are left out.
pub(crate) fn cluster() -> Option<&'static Cluster> {
    static SHARED: OnceLock<Option<Cluster>> = OnceLock::new();
    SHARED.get_or_init(Cluster::start).as_ref()
}

/// Options for a store of one test: a schema that nobody else uses.
pub(crate) fn fresh(cluster: &Cluster) -> BackendOptions {
    BackendOptions::new().database_url(cluster.url("?sslmode=disable")).set("database_schema", fresh_schema())
}

pub(crate) fn fresh_schema() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A URL of the tests' database at one of several servers of this machine.
pub(crate) fn url_of_hosts(user: &str, ports: &[u16]) -> String {
    let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    format!("postgres://{user}:{PASSWORD}@{}/tests?sslmode=disable", hosts.join(","))
}

/// Where its programs are: those of the newest version. `None`: servers are left out.
fn binaries() -> Option<PathBuf> {
    let mut versions: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .filter(|(_, bin)| bin.join("initdb").exists() && bin.join("postgres").exists())
        .collect();
    versions.sort();
    let found = versions.pop().map(|(_, bin)| bin);
    servers::needed("PostgreSQL's server", found, "`.ci/check setup`, or apt-get install postgresql")
}

fn is_root() -> bool {
    String::from_utf8(run(Command::new("id").arg("-u")).stdout).unwrap().trim() == "0"
}

/// The words before a command that run it as who may run a server: PostgreSQL refuses root.
fn as_server() -> Vec<String> {
    if !is_root() {
        return Vec::new();
    }
    ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"].map(str::to_owned).into()
}

fn command(words: &[String], program: &Path) -> Command {
    let mut all = words.iter().map(PathBuf::from).chain([program.to_owned()]);
    let mut command = Command::new(all.next().unwrap());
    command.args(all);
    command
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

impl Cluster {
    /// Makes a cluster and starts it; `None`: servers are left out.
    pub(crate) fn start() -> Option<Self> {
        let bin = binaries()?;
        let folder = tempfile::Builder::new().prefix("seeknal-pg-").tempdir().unwrap().keep();
        certificates(&folder);
        std::fs::write(folder.join("password"), PASSWORD).unwrap();
        if is_root() {
            run(Command::new("chown").arg("-R").arg("postgres:postgres").arg(&folder));
        }
        let data = folder.join("data");
        run(command(&as_server(), &bin.join("initdb"))
            .args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--pwfile"])
            .arg(folder.join("password"))
            .arg("-D")
            .arg(&data));
        let settings = format!(
            "\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{folder}'\nmax_connections = 400\nssl = on\n\
             ssl_cert_file = '{folder}/server.crt'\nssl_key_file = '{folder}/server.key'\nrecovery_init_sync_method = syncfs\n",
            folder = folder.display()
        );
        let mut file = std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf")).unwrap();
        file.write_all(settings.as_bytes()).unwrap();
        let cluster = Self::on_a_free_port(bin, folder);
        cluster.sql("CREATE DATABASE tests");
        cluster.sql(&format!("CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'"));
        Some(cluster)
    }

    /// A standby that follows this one.
    pub(crate) fn standby(&self) -> Self {
        let folder = tempfile::Builder::new().prefix("seeknal-pg-").tempdir().unwrap().keep();
        if is_root() {
            run(Command::new("chown").arg("postgres:postgres").arg(&folder));
        }
        let data = folder.join("data");
        run(command(&as_server(), &self.bin.join("pg_basebackup"))
            .env("PGPASSWORD", PASSWORD)
            .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &self.port.to_string()])
            .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "-D"])
            .arg(&data));
        Self::on_a_free_port(self.bin.clone(), folder)
    }

    /// Starts what lies in a folder. Between choosing a port and using it somebody else may take it.
    fn on_a_free_port(bin: PathBuf, folder: PathBuf) -> Self {
        for _ in 0..10 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut settings = std::fs::OpenOptions::new().append(true).open(folder.join("data/postgresql.conf")).unwrap();
            // The last one counts.
            writeln!(settings, "port = {port}").unwrap();
            let _old = std::fs::remove_file(folder.join("log"));
            let mut cluster = Self { keeper: keep(&bin, &folder), bin: bin.clone(), folder: folder.clone(), port };
            if cluster.comes_up() {
                return cluster;
            }
            cluster.leave();
        }
        panic!("no server came up in {}", folder.display());
    }

    /// Cuts a standby off from its primary: of what that one commits from now on it knows nothing.
    pub(crate) fn cut_off(&self) {
        self.sql("ALTER SYSTEM SET primary_conninfo = ''");
        self.sql("SELECT pg_reload_conf()");
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.sql("SELECT count(*) FROM pg_stat_wal_receiver") != "0" {
            assert!(Instant::now() < deadline, "the standby goes on following");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it answers; `false`: it has ended, because somebody else has its port, who may answer instead.
    fn comes_up(&self) -> bool {
        let says_so = || {
            let pid = std::fs::read_to_string(self.folder.join("data/postmaster.pid")).unwrap_or_default();
            pid.lines().nth(7).is_some_and(|status| ["ready", "standby"].contains(&status.trim()))
        };
        let log = || std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if log().contains("could not create any TCP/IP sockets") {
                return false;
            }
            let ready = Command::new(self.bin.join("pg_isready"))
                .args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()])
                .status()
                .unwrap();
            if ready.success() && says_so() {
                return true;
            }
            assert!(Instant::now() < deadline, "PostgreSQL did not start:\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A URL of the tests' database for its owner; `query` begins with `?` or is empty.
    pub(crate) fn url(&self, query: &str) -> String {
        self.url_of("postgres", PASSWORD, "127.0.0.1", query)
    }

    pub(crate) fn url_of(&self, user: &str, password: &str, host: &str, query: &str) -> String {
        format!("postgres://{user}:{password}@{host}:{}/tests{query}", self.port)
    }

    /// The certificate of who signed the server's, which names `localhost`.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Somebody else's certificate.
    pub(crate) fn other_ca_file(&self) -> PathBuf {
        self.folder.join("other.crt")
    }

    fn psql(&self, database: &str, sql: &str) -> String {
        let output = run(Command::new(self.bin.join("psql"))
            .env("PGPASSWORD", PASSWORD)
            .args(["-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres", "-d", database])
            .args(["-p", &self.port.to_string(), "-c", sql]));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Runs SQL on the server's own database.
    pub(crate) fn sql(&self, sql: &str) -> String {
        self.psql("postgres", sql)
    }

    /// Runs SQL in a schema of the tests' database, and answers with its rows as text.
    pub(crate) fn sql_in(&self, schema: &str, sql: &str) -> String {
        self.psql("tests", &format!("SET search_path = \"{schema}\"; {sql}"))
    }

    /// Runs SQL on another database of it.
    pub(crate) fn sql_of(&self, database: &str, sql: &str) -> String {
        self.psql(database, sql)
    }

    /// A session that runs SQL and stays.
    pub(crate) fn session(&self, schema: &str, sql: &str) -> Child {
        let mut child = Command::new(self.bin.join("psql"))
            .env("PGPASSWORD", PASSWORD)
            .args(["-X", "-q", "-h", "127.0.0.1", "-U", "postgres", "-d", "tests", "-p", &self.port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        writeln!(child.stdin.as_mut().unwrap(), "SET search_path = \"{schema}\"; {sql}").unwrap();
        child
    }

    /// A program of an operator's that is asked for the superuser of a database.
    fn operator(&self, program: &str, database: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.env("PGPASSWORD", PASSWORD).args(["-h", "127.0.0.1", "-U", "postgres", "-d", database]);
        command.args(["-p", &self.port.to_string()]);
        command
    }

    /// A dump of a schema, as an operator makes it.
    pub(crate) fn dump(&self, database: &str, schema: &str) -> Vec<u8> {
        run(self.operator("pg_dump", database).args(["-n", schema])).stdout
    }

    /// Brings a dump back into a new database.
    pub(crate) fn restore(&self, dump: &[u8], to: &str) {
        self.sql(&format!("CREATE DATABASE {to}"));
        let file = self.folder.join(format!("{to}.sql"));
        std::fs::write(&file, dump).unwrap();
        run(self.operator("psql", to).args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-f"]).arg(&file));
    }

    /// Copies a schema into a new database, by a dump as an operator makes it.
    pub(crate) fn copy(&self, from: &str, schema: &str, to: &str) {
        self.restore(&self.dump(from, schema), to);
    }

    /// Kills the server as `kill -9` does; its processes see that it is gone, and end as if they had crashed.
    pub(crate) fn kill(&mut self) {
        let pid = std::fs::read_to_string(self.folder.join("data/postmaster.pid")).unwrap();
        run(Command::new("kill").args(["-9", pid.lines().next().unwrap()]));
        self.leave();
        // The shared memory of the dead must be free before a new one starts.
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.is_anybody_left() {
            assert!(Instant::now() < deadline, "processes of the killed server stay");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end of the server, and lets its folder stay.
    fn leave(&mut self) {
        writeln!(self.keeper.stdin.take().unwrap(), "stay").unwrap();
        self.keeper.wait().unwrap();
    }

    /// Whether a process works in the folder of the data.
    fn is_anybody_left(&self) -> bool {
        let data = self.folder.join("data");
        std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .any(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data))
    }

    /// Starts it again after [`kill`](Self::kill); it recovers.
    pub(crate) fn start_again(&mut self) {
        self.keeper = keep(&self.bin, &self.folder);
        assert!(self.comes_up(), "somebody else has its port");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _gone = self.keeper.wait();
    }
}

/// Starts the server under a shell that outlives this process by as long as stopping takes.
fn keep(bin: &Path, folder: &Path) -> Child {
    let script = format!(
        "trap '' INT HUP; {as_server} '{bin}/postgres' -D '{folder}/data' >>'{folder}/log' 2>&1 </dev/null & server=$!; \
         read -r what; [ \"$what\" = stay ] || kill -QUIT $server 2>/dev/null; wait $server; \
         [ \"$what\" = stay ] || rm -rf '{folder}'",
        as_server = as_server().join(" "),
        bin = bin.display(),
        folder = folder.display(),
    );
    Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// A certificate of an authority, one of the server that it signed, and one of somebody else.
fn certificates(folder: &Path) {
    let openssl = |args: &[&str]| {
        run(Command::new("openssl").current_dir(folder).args(args));
    };
    for name in ["ca", "other"] {
        openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "30",
            "-subj",
            &format!("/CN=the tests' {name}"),
            "-keyout",
            &format!("{name}.key"),
            "-out",
            &format!("{name}.crt"),
        ]);
    }
    openssl(&[
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-keyout",
        "server.key",
        "-out",
        "server.csr",
    ]);
    std::fs::write(folder.join("names"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    openssl(&[
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "30",
        "-extfile",
        "names",
        "-out",
        "server.crt",
    ]);
    std::fs::set_permissions(folder.join("server.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    // The server's user must be able to look into the folder, and others must not.
    std::fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}
