//! The hosts that a URL names, and their addresses. Each address has the whole limit of time for itself, over name, TCP, TLS and authentication together: the
//! driver's own limit is one for TCP alone, and who accepts a connection and says nothing would keep it from the next one.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, LoadBalanceHosts, TargetSessionAttrs};

/// One of the hosts of a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Its name; an address without a name stands for it.
    host: Host,
    /// The address that the URL gives it.
    address: Option<IpAddr>,
    port: u16,
}

impl Target {
    /// What people call it; with the address where it has several.
    pub(super) fn name(&self, address: Option<IpAddr>) -> String {
        let name = match &self.host {
            Host::Tcp(name) if name.contains(':') => format!("[{name}]"),
            Host::Tcp(name) => name.clone(),
            #[cfg(unix)]
            Host::Unix(path) => path.display().to_string(),
        };
        let address = address.map(|address| format!(" ({address})")).unwrap_or_default();
        format!("{name}:{}{address}", self.port)
    }
}

/// All hosts of a URL, in its order. The error says what does not fit.
pub(super) fn targets(config: &Config) -> Result<Vec<Target>, &'static str> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    if count == 0 {
        return Err("it names no host");
    }
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err("there are not as many of host as of hostaddr");
    }
    if ports.len() > 1 && ports.len() != count {
        return Err("there are not as many ports as hosts");
    }
    let target = |at: usize| {
        let address = addresses.get(at).copied();
        let host = hosts.get(at).cloned().or_else(|| address.map(|address| Host::Tcp(address.to_string())))?;
        Some(Target { host, address, port: ports.get(at).or(ports.first()).copied().unwrap_or(5432) })
    };
    Ok((0..count).filter_map(target).collect())
}

/// In which order they are tried: the one that was reached last comes first.
pub(super) fn order(config: &Config, count: usize, last: Option<usize>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        let random = RandomState::new();
        order.sort_by_cached_key(|at| random.hash_one(at));
    } else {
        order.sort_by_key(|at| Some(*at) != last);
    }
    order
}

/// The addresses of one host. None: a socket of this machine has none.
pub(super) async fn addresses(target: &Target, limit: Duration, last: Option<IpAddr>) -> Result<Vec<Option<IpAddr>>, String> {
    if target.address.is_some() {
        return Ok(vec![target.address]);
    }
    let name = match &target.host {
        Host::Tcp(name) => name,
        #[cfg(unix)]
        Host::Unix(_) => return Ok(vec![None]),
    };
    if let Ok(address) = name.parse() {
        return Ok(vec![Some(address)]);
    }
    let found = tokio::time::timeout(limit, tokio::net::lookup_host((name.as_str(), target.port))).await;
    let found = found.map_err(|_| format!("no address for the host's name within {} s", limit.as_secs()))?;
    let found = found.map_err(|error| format!("no address for the host's name: {error}"))?;
    let mut addresses: Vec<Option<IpAddr>> = Vec::new();
    for address in found {
        if !addresses.contains(&Some(address.ip())) {
            addresses.push(Some(address.ip()));
        }
    }
    if addresses.is_empty() {
        return Err("no address for the host's name".to_owned());
    }
    addresses.sort_by_key(|address| last.is_some() && *address != last);
    Ok(addresses)
}

/// The settings for one address of one host.
pub(super) fn single(config: &Config, attrs: TargetSessionAttrs, target: &Target, address: Option<IpAddr>) -> Config {
    let mut single = Config::new();
    single
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .target_session_attrs(attrs)
        .channel_binding(config.get_channel_binding())
        .port(target.port);
    match &target.host {
        Host::Tcp(name) => single.host(name),
        #[cfg(unix)]
        Host::Unix(path) => single.host_path(path),
    };
    if let Some(address) = address {
        single.hostaddr(address);
    }
    if let Some(user) = config.get_user() {
        single.user(user);
    }
    if let Some(password) = config.get_password() {
        single.password(password);
    }
    if let Some(database) = config.get_dbname() {
        single.dbname(database);
    }
    if let Some(options) = config.get_options() {
        single.options(options);
    }
    if let Some(name) = config.get_application_name() {
        single.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        single.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        single.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        single.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        single.keepalives_retries(retries);
    }
    single
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    fn of(url: &str) -> Config {
        Config::from_str(url).unwrap()
    }

    #[test]
    fn one_of_several_hosts_has_everything_of_the_url_but_the_others() {
        let url = "postgres://u:p@a:1,b:2/d?application_name=n&options=-cx%3Dy&connect_timeout=7&tcp_user_timeout=9&keepalives_idle=3\
                   &keepalives_interval=4&keepalives_retries=5&target_session_attrs=read-write&channel_binding=disable&sslmode=require";
        let all = of(url);
        let targets = targets(&all).unwrap();
        for (target, url) in targets.iter().zip([url.replace("a:1,b:2", "a:1"), url.replace("a:1,b:2", "b:2")]) {
            assert_eq!(single(&all, TargetSessionAttrs::ReadWrite, target, None), of(&url));
        }
        let unix = of("postgres://u@%2Ftmp:7/d");
        assert_eq!(single(&unix, TargetSessionAttrs::Any, &super::targets(&unix).unwrap()[0], None), unix);
    }

    #[test]
    fn hosts_and_addresses_and_ports_must_fit() {
        let addressed = of("postgres:///d?hostaddr=10.0.0.1,10.0.0.2&port=6");
        let targets_of = |url: &str| targets(&of(url));
        let found = targets(&addressed).unwrap();
        assert_eq!((found.len(), found[1].port, &found[1].host), (2, 6, &Host::Tcp("10.0.0.2".to_owned())));
        for url in ["postgres:///d", "postgres://a,b/d?hostaddr=10.0.0.1", "postgres://a:1,b:2/d?port=3"] {
            assert!(targets_of(url).is_err(), "{url}");
        }
    }

    #[test]
    fn who_was_reached_last_comes_first() {
        let fixed = of("postgres://a,b,c/d");
        assert_eq!(order(&fixed, 3, None), [0, 1, 2]);
        assert_eq!(order(&fixed, 3, Some(2)), [2, 0, 1]);
        let mut random = order(&of("postgres://a,b,c/d?load_balance_hosts=random"), 3, Some(0));
        random.sort_unstable();
        assert_eq!(random, [0, 1, 2]);
    }
}
