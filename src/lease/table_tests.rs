//! The lease table against a naive oracle that scans everything, and the cases that have a name.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::lease::locks::LOOKED_AT;
use crate::model::NodeId;

fn run(name: &str) -> RunId {
    RunId::new(name).unwrap()
}

fn whole(name: &str) -> LeaseKey {
    LeaseKey::run(run(name))
}

fn node(name: &str, node: &str) -> LeaseKey {
    LeaseKey::node(run(name), NodeId::new(node).unwrap())
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn ask(ticket: u64, key: &LeaseKey, owner: Option<&str>) -> Ask {
    Ask {
        ticket: Ticket(ticket),
        key: key.clone(),
        owner: owner.map(Arc::from),
        reentrant: false,
        wait_until: Some(ms(1_000_000)),
    }
}

#[derive(Debug, Clone)]
struct Item {
    ticket: Ticket,
    key: LeaseKey,
    owner: Option<Arc<str>>,
    phase: Phase,
}

impl Item {
    fn waits(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. })
    }

    fn identity(&self) -> Option<String> {
        match (&self.owner, self.phase) {
            (_, Phase::Leaving) => None,
            (Some(owner), _) => Some(owner.to_string()),
            (None, _) => Some(format!("#{}", self.ticket.0)),
        }
    }
}

/// All requests in order of arrival, and nothing clever.
#[derive(Debug, Default)]
struct Oracle {
    items: Vec<Item>,
}

impl Oracle {
    fn settle(&mut self) -> BTreeSet<Ticket> {
        let mut next = BTreeSet::new();
        for at in 0..self.items.len() {
            let this = &self.items[at];
            let blocked = self
                .items
                .iter()
                .enumerate()
                .any(|(i, other)| i != at && other.key.excludes(&this.key) && (!other.waits() || i < at));
            if this.waits() && !blocked {
                next.insert(this.ticket);
                self.items[at].phase = Phase::Claimed;
            }
        }
        next
    }

    fn remove(&mut self, ticket: Ticket) -> BTreeSet<Ticket> {
        self.items.retain(|item| item.ticket != ticket);
        self.settle()
    }

    fn closes_cycle(&self, owner: &str, key: &LeaseKey) -> bool {
        let blockers = |key: &LeaseKey, upto: usize| -> Vec<String> {
            let in_the_way =
                self.items.iter().enumerate().filter(|(i, other)| other.key.excludes(key) && (!other.waits() || *i < upto));
            in_the_way.filter_map(|(_, other)| other.identity()).collect()
        };
        let mut seen = BTreeSet::new();
        let mut todo: Vec<String> = blockers(key, usize::MAX).into_iter().filter(|who| who != owner).collect();
        while let Some(who) = todo.pop() {
            if who == owner {
                return true;
            }
            if seen.insert(who.clone()) {
                for (at, item) in self.items.iter().enumerate() {
                    if item.waits() && item.identity().as_deref() == Some(&who) {
                        todo.extend(blockers(&item.key, at).into_iter().filter(|next| *next != who));
                    }
                }
            }
        }
        false
    }

    fn ask(&mut self, ask: &Ask) -> Asked {
        let mut shares = false;
        if let Some(owner) = &ask.owner {
            let own: Vec<&Item> = self
                .items
                .iter()
                .filter(|item| item.phase != Phase::Leaving && item.owner.as_ref() == Some(owner) && item.key.excludes(&ask.key))
                .collect();
            if own.iter().any(|item| !ask.reentrant || item.key != ask.key) {
                return Asked::Reentrant { own: ask.key.clone() };
            }
            shares = !own.is_empty();
            let ticket = own.iter().find(|item| matches!(item.phase, Phase::Held { .. })).map(|item| item.ticket);
            if let Some(ticket) = ticket {
                let item = self.items.iter_mut().find(|item| item.ticket == ticket).unwrap();
                let Phase::Held { token, count, .. } = &mut item.phase else { unreachable!() };
                *count += 1;
                return Asked::Joined(*token);
            }
        }
        let free = !self.items.iter().any(|item| item.key.excludes(&ask.key));
        let phase = match (free, ask.wait_until) {
            (true, _) => Phase::Claimed,
            (false, None) => return Asked::Busy,
            (false, Some(until)) => Phase::Waiting { until },
        };
        if !free && !shares && ask.owner.as_ref().is_some_and(|owner| self.closes_cycle(owner, &ask.key)) {
            return Asked::Deadlock { cycle: Vec::new() };
        }
        self.items.push(Item { ticket: ask.ticket, key: ask.key.clone(), owner: ask.owner.clone(), phase });
        if free { Asked::Claimed } else { Asked::Queued }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Ask { run: u8, node: Option<u8>, owner: Option<u8>, reentrant: bool, wait: Option<u64> },
    Confirm { at: usize, ttl: Option<u64> },
    Vacate { at: usize },
    Release { at: usize },
    Force { at: usize },
    Renew { at: usize, ttl: u64 },
    Pass { by: u64 },
    Clear { run: u8 },
}

fn op() -> impl Strategy<Value = Op> {
    let place = any::<usize>();
    prop_oneof![
        8 => (0..2u8, prop::option::weighted(0.7, 0..3u8), prop::option::weighted(0.8, 0..4u8), any::<bool>(), prop::option::weighted(0.8, 1..60u64))
            .prop_map(|(run, node, owner, reentrant, wait)| Op::Ask { run, node, owner, reentrant, wait }),
        5 => (place, prop::option::of(1..40u64)).prop_map(|(at, ttl)| Op::Confirm { at, ttl }),
        2 => place.prop_map(|at| Op::Vacate { at }),
        4 => place.prop_map(|at| Op::Release { at }),
        1 => place.prop_map(|at| Op::Force { at }),
        1 => (place, 1..40u64).prop_map(|(at, ttl)| Op::Renew { at, ttl }),
        2 => (1..30u64).prop_map(|by| Op::Pass { by }),
        1 => (0..2u8).prop_map(|run| Op::Clear { run }),
    ]
}

fn set(tickets: Vec<Ticket>) -> BTreeSet<Ticket> {
    let count = tickets.len();
    let set: BTreeSet<Ticket> = tickets.into_iter().collect();
    assert_eq!(set.len(), count, "a ticket was named twice");
    set
}

fn pick<T: Copy>(all: &[T], at: usize) -> Option<T> {
    all.get(at.checked_rem(all.len())?).copied()
}

fn compare(table: &LeaseTable, oracle: &Oracle) {
    assert_eq!(table.slots.len(), oracle.items.len());
    for item in &oracle.items {
        let slot = &table.slots[&item.ticket];
        assert_eq!((&slot.key, slot.phase), (&item.key, item.phase), "{item:?}");
    }
    for (at, one) in oracle.items.iter().enumerate() {
        let clash = oracle.items.iter().skip(at + 1).find(|other| !one.waits() && !other.waits() && one.key.excludes(&other.key));
        assert!(clash.is_none(), "two exclude one another: {one:?} {clash:?}");
    }
    if oracle.items.is_empty() {
        assert!(table.runs.is_empty() && table.owners.is_empty() && table.tokens.is_empty(), "{table:?}");
        assert!(table.expiries.is_empty() && table.timeouts.is_empty(), "{table:?}");
    }
    let deadlines = oracle.items.iter().filter_map(|item| match item.phase {
        Phase::Waiting { until } => Some(until),
        Phase::Held { expires, .. } => expires,
        _ => None,
    });
    assert_eq!(table.next_deadline(), deadlines.min());
}

fn apply(table: &mut LeaseTable, oracle: &mut Oracle, now: &mut u64, number: u64, op: Op) {
    let of = |oracle: &Oracle, wanted: fn(&Phase) -> bool| -> Vec<Ticket> {
        oracle.items.iter().filter(|item| wanted(&item.phase)).map(|item| item.ticket).collect()
    };
    let held = |oracle: &Oracle| -> Vec<(Ticket, FencingToken)> {
        let tokens = oracle.items.iter().filter_map(|item| match item.phase {
            Phase::Held { token, .. } => Some((item.ticket, token)),
            _ => None,
        });
        tokens.collect()
    };
    let phase = |oracle: &mut Oracle, ticket: Ticket, phase: Phase| {
        oracle.items.iter_mut().find(|item| item.ticket == ticket).unwrap().phase = phase;
    };
    match op {
        Op::Ask { run: r, node: n, owner, reentrant, wait } => {
            let name = format!("r{r}");
            let key = n.map_or_else(|| whole(&name), |n| node(&name, &format!("n{n}")));
            let owner: Option<Arc<str>> = owner.map(|o| Arc::from(format!("o{o}")));
            let ask = Ask { ticket: Ticket(number), key, owner, reentrant, wait_until: wait.map(|wait| ms(*now + wait)) };
            match (table.ask(ask.clone()), oracle.ask(&ask)) {
                (Asked::Reentrant { own }, Asked::Reentrant { .. }) => assert!(own.excludes(&ask.key)),
                (Asked::Deadlock { cycle }, Asked::Deadlock { .. }) => {
                    assert_eq!(cycle.first(), ask.owner.as_ref());
                    assert!(cycle.len() >= 2, "{cycle:?}");
                }
                (got, expected) => assert_eq!(got, expected, "{ask:?}"),
            }
        }
        Op::Confirm { at, ttl } => {
            let Some(ticket) = pick(&of(oracle, |p| *p == Phase::Claimed), at) else { return };
            let expires = ttl.map(|ttl| ms(*now + ttl));
            let sharing = set(table.confirm(ticket, FencingToken(number), expires));
            let item = oracle.items.iter().find(|item| item.ticket == ticket).unwrap().clone();
            let twins = oracle.items.iter().filter(|other| {
                other.ticket != ticket
                    && item.owner.is_some()
                    && other.owner == item.owner
                    && other.key == item.key
                    && other.waits()
            });
            let twins: BTreeSet<Ticket> = twins.map(|other| other.ticket).collect();
            assert_eq!(sharing, twins);
            let count = 1 + u32::try_from(twins.len()).unwrap();
            phase(oracle, ticket, Phase::Held { token: FencingToken(number), count, expires });
            oracle.items.retain(|other| !twins.contains(&other.ticket));
            assert!(oracle.settle().is_empty());
        }
        Op::Vacate { at } => {
            let Some(ticket) = pick(&of(oracle, |_| true), at) else { return };
            assert_eq!(set(table.vacate(ticket)), oracle.remove(ticket));
        }
        Op::Release { at } => {
            assert_eq!(table.release(FencingToken(u64::MAX)), Released::Unknown);
            let Some((ticket, token)) = pick(&held(oracle), at) else { return };
            let item = oracle.items.iter_mut().find(|item| item.ticket == ticket).unwrap();
            let Phase::Held { count, .. } = &mut item.phase else { unreachable!() };
            *count -= 1;
            if *count > 0 {
                assert_eq!(table.release(token), Released::Shared);
            } else {
                assert_eq!(table.release(token), Released::Leaving(ticket));
                assert_eq!(table.release(token), Released::Unknown);
                item.phase = Phase::Leaving;
            }
        }
        Op::Force { at } => {
            let Some((ticket, token)) = pick(&held(oracle), at) else { return };
            assert_eq!(table.force(token), Some(ticket));
            phase(oracle, ticket, Phase::Leaving);
        }
        Op::Renew { at, ttl } => {
            let Some((ticket, token)) = pick(&held(oracle), at) else { return };
            let item = oracle.items.iter_mut().find(|item| item.ticket == ticket).unwrap();
            let Phase::Held { expires, .. } = &mut item.phase else { unreachable!() };
            assert!(table.renew(token, ms(*now + ttl), ms(*now)), "what has expired was taken out when time passed");
            if let Some(expires) = expires {
                *expires = (*expires).max(ms(*now + ttl));
            }
        }
        Op::Pass { by } => {
            *now += by;
            let expired = set(table.expire(ms(*now)));
            let due: BTreeSet<Ticket> = oracle
                .items
                .iter()
                .filter(|item| matches!(item.phase, Phase::Held { expires: Some(at), .. } if at <= ms(*now)))
                .map(|item| item.ticket)
                .collect();
            assert_eq!(expired, due);
            for ticket in due {
                phase(oracle, ticket, Phase::Leaving);
                assert_eq!(set(table.vacate(ticket)), oracle.remove(ticket));
            }
            let (late, next) = table.time_out(ms(*now));
            let mut claimed = BTreeSet::new();
            let mut times: Vec<(Duration, Ticket)> = oracle
                .items
                .iter()
                .filter_map(|item| match item.phase {
                    Phase::Waiting { until } if until <= ms(*now) => Some((until, item.ticket)),
                    _ => None,
                })
                .collect();
            times.sort();
            let mut gone = BTreeSet::new();
            for (_, ticket) in times {
                if !claimed.contains(&ticket) {
                    gone.insert(ticket);
                    claimed.extend(oracle.remove(ticket));
                }
            }
            assert_eq!((set(late), set(next)), (gone, claimed));
        }
        Op::Clear { run: r } => {
            let name = run(&format!("r{r}"));
            let stays = |token: &FencingToken| token.0.is_multiple_of(3);
            let cleared = table.clear_run(&name, |_, token| stays(&token));
            let of_run = |wanted: fn(&Phase) -> bool| -> BTreeSet<Ticket> {
                let items = oracle.items.iter().filter(|item| item.key.run == name && wanted(&item.phase));
                items.map(|item| item.ticket).collect()
            };
            let waiting = of_run(|p| matches!(p, Phase::Waiting { .. }));
            assert!(cleared.waiting.is_sorted());
            assert_eq!(set(cleared.waiting), waiting);
            assert_eq!(set(cleared.claimed), of_run(|p| matches!(p, Phase::Claimed)));
            let held = of_run(|p| matches!(p, Phase::Held { token, .. } if !token.0.is_multiple_of(3)));
            assert_eq!(set(cleared.held), held);
            oracle.items.retain(|item| !waiting.contains(&item.ticket));
            for ticket in held {
                phase(oracle, ticket, Phase::Leaving);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_the_oracle(ops in prop::collection::vec(op(), 1..80)) {
        let (mut table, mut oracle, mut now) = (LeaseTable::default(), Oracle::default(), 0);
        for (number, op) in ops.into_iter().enumerate() {
            apply(&mut table, &mut oracle, &mut now, number as u64 + 1, op);
            compare(&table, &oracle);
        }
        // Nobody is lost: when all that is in the way goes, one after another, everybody has had a turn.
        while let Some(first) = oracle.items.first().map(|item| item.ticket) {
            assert_eq!(set(table.vacate(first)), oracle.remove(first));
            compare(&table, &oracle);
        }
    }
}

/// How many waiters the queues were gone along for, each time, while this was done.
fn looks(work: impl FnOnce()) -> usize {
    let before = LOOKED_AT.get();
    work();
    LOOKED_AT.get() - before
}

/// Each of them is let in behind the one before; a queue is looked at for its front alone.
#[test]
fn ten_thousand_waiters_are_served_in_order_and_each_is_looked_at_once() {
    const N: u64 = 10_000;
    for (key, beside) in [(node("r", "n"), false), (node("r", "n"), true), (whole("r"), false)] {
        let mut table = LeaseTable::default();
        let other = |ticket: u64| ask(N + ticket, &node("r", "beside"), None);
        let looked = looks(|| {
            for ticket in 0..N {
                let asked = table.ask(ask(ticket, &key, Some(&format!("owner {ticket}"))));
                assert_eq!(asked, if ticket == 0 { Asked::Claimed } else { Asked::Queued });
                if beside {
                    // Another queue of the same run, that stands still.
                    table.ask(other(ticket));
                }
            }
        });
        assert_eq!(looked, 0, "{key}: who comes last looks at nobody");
        for ticket in 0..N {
            let looked = looks(|| {
                table.confirm(Ticket(ticket), FencingToken(ticket + 1), None);
                assert_eq!(table.release(FencingToken(ticket + 1)), Released::Leaving(Ticket(ticket)));
                let next = table.vacate(Ticket(ticket));
                assert_eq!(next, if ticket + 1 < N { vec![Ticket(ticket + 1)] } else { vec![] });
            });
            assert!(looked <= 1, "{key}: {looked} were looked at for one to be let in");
        }
        assert_eq!(table.is_empty(), !beside);
    }
}

/// Who leaves a queue by himself, at its end or in its middle, makes nobody look at those who stay.
#[test]
fn ten_thousand_waiters_who_give_up_are_not_looked_at_again_and_again() {
    const N: u64 = 10_000;
    for key in [node("r", "n"), whole("r")] {
        let mut table = LeaseTable::default();
        for ticket in 0..N {
            table.ask(Ask { wait_until: Some(ms(1 + ticket % 7)), ..ask(ticket, &key, None) });
        }
        let looked = looks(|| assert_eq!(table.time_out(ms(7)).0.len() as u64, N - 1));
        assert!((looked as u64) < N, "{key}: {looked} were looked at");
        assert_eq!(table.vacate(Ticket(0)), []);
        assert!(table.is_empty());
    }
}

/// Who waits for a node behind somebody who waits for the whole run is looked at when that one has gone, and only then.
#[test]
fn ten_thousand_waiters_behind_one_another_are_looked_at_once() {
    const N: u64 = 10_000;
    for first_goes_first in [true, false] {
        let mut table = LeaseTable::default();
        assert_eq!(table.ask(ask(0, &node("r", "n"), None)), Asked::Claimed);
        for ticket in 1..=N {
            let until = if first_goes_first { ticket } else { N + 1 - ticket };
            let asked = match ticket % 2 {
                1 => Ask { wait_until: Some(ms(until)), ..ask(ticket, &whole("r"), None) },
                _ => ask(ticket, &node("r", "n"), None),
            };
            assert_eq!(table.ask(asked), Asked::Queued);
        }
        let looked = looks(|| assert_eq!(table.time_out(ms(N)).0.len() as u64, N / 2));
        assert!(looked as u64 <= N, "{first_goes_first}: {looked} were looked at");
    }
}

/// Each of ten thousand owners holds a lock of its own and waits for one that all want: the search for cycles looks at each once, not all at all.
#[test]
fn holders_who_queue_are_searched_in_linear_time() {
    const N: u64 = 10_000;
    let mut table = LeaseTable::default();
    let popular = whole("popular");
    let looked = looks(|| {
        for n in 0..N {
            let owner = format!("owner {n}");
            assert_eq!(table.ask(ask(2 * n, &whole(&format!("own {n}")), Some(&owner))), Asked::Claimed);
            let asked = table.ask(ask(2 * n + 1, &popular, Some(&owner)));
            assert_eq!(asked, if n == 0 { Asked::Claimed } else { Asked::Queued });
        }
    });
    assert_eq!(looked, 0, "nobody waits for those who come");
    let looked = looks(|| {
        let own = table.ask(ask(u64::MAX, &whole("own 7"), Some("owner 0")));
        let Asked::Deadlock { cycle } = own else { panic!("{own:?}") };
        assert_eq!(cycle, ["owner 0".into(), "owner 7".into()] as [Arc<str>; 2]);
    });
    assert!((looked as u64) < N, "{looked} were looked at to find the one");
    // Where there is none to be found, all are asked.
    assert_eq!(table.ask(ask(u64::MAX - 2, &whole("of nobody here"), Some("other"))), Asked::Claimed);
    let looked = looks(|| {
        assert_eq!(table.ask(ask(u64::MAX - 3, &whole("of nobody here"), Some("owner 0"))), Asked::Queued);
    });
    assert!((looked as u64) < N, "{looked} were looked at to find none");
}

#[test]
fn a_cycle_is_named_in_order() {
    let mut table = LeaseTable::default();
    for (ticket, owner) in ["ann", "bob", "cid"].into_iter().enumerate() {
        assert_eq!(table.ask(ask(ticket as u64, &whole(owner), Some(owner))), Asked::Claimed);
    }
    assert_eq!(table.ask(ask(10, &node("bob", "x"), Some("ann"))), Asked::Queued);
    assert_eq!(table.ask(ask(11, &whole("cid"), Some("bob"))), Asked::Queued);
    let expected: Vec<Arc<str>> = vec!["cid".into(), "ann".into(), "bob".into()];
    assert_eq!(table.ask(ask(12, &whole("ann"), Some("cid"))), Asked::Deadlock { cycle: expected });
    let try_once = Ask { wait_until: None, ..ask(13, &whole("ann"), Some("cid")) };
    assert_eq!(table.ask(try_once), Asked::Busy, "who does not wait closes no cycle");
}

/// A cycle may run through the queue itself: past somebody without a name who waits in it.
#[test]
fn a_cycle_through_a_waiter_without_a_name_is_found() {
    let mut table = LeaseTable::default();
    assert_eq!(table.ask(ask(1, &node("r", "a"), Some("ann"))), Asked::Claimed);
    assert_eq!(table.ask(ask(2, &whole("other"), Some("bob"))), Asked::Claimed);
    assert_eq!(table.ask(ask(3, &whole("r"), None)), Asked::Queued);
    assert_eq!(table.ask(ask(4, &node("r", "b"), Some("bob"))), Asked::Queued, "behind the nameless one");
    let asked = table.ask(ask(5, &whole("other"), Some("ann")));
    let Asked::Deadlock { cycle } = asked else { panic!("{asked:?}") };
    assert_eq!(cycle, ["ann".into(), "bob".into(), "a caller without a name".into()] as [Arc<str>; 3]);
}

#[test]
fn re_entry_is_refused_or_counted() {
    let mut table = LeaseTable::default();
    let key = node("r", "a");
    table.ask(ask(1, &key, Some("ann")));
    table.confirm(Ticket(1), FencingToken(1), None);
    assert_eq!(table.ask(ask(2, &key, Some("ann"))), Asked::Reentrant { own: key.clone() });
    assert_eq!(table.ask(ask(3, &whole("r"), Some("ann"))), Asked::Reentrant { own: key.clone() });
    assert_eq!(table.ask(ask(4, &node("r", "b"), Some("ann"))), Asked::Claimed, "another node is no re-entry");
    let again = |ticket| Ask { reentrant: true, ..ask(ticket, &key, Some("ann")) };
    assert_eq!(table.ask(again(5)), Asked::Joined(FencingToken(1)));
    assert_eq!(table.release(FencingToken(1)), Released::Shared);
    assert_eq!(table.release(FencingToken(1)), Released::Leaving(Ticket(1)));
    assert_eq!(table.ask(again(6)), Asked::Queued, "what is leaving is not held any more");
}

#[test]
fn a_whole_run_waiter_is_not_passed() {
    let mut table = LeaseTable::default();
    assert_eq!(table.ask(ask(1, &node("r", "a"), None)), Asked::Claimed);
    assert_eq!(table.ask(ask(2, &node("r", "a"), None)), Asked::Queued);
    assert_eq!(table.ask(ask(3, &node("r", "b"), None)), Asked::Claimed, "another node passes");
    assert_eq!(table.ask(ask(4, &whole("r"), None)), Asked::Queued);
    assert_eq!(table.ask(ask(5, &node("r", "c"), None)), Asked::Queued, "not past the waiter for the whole run");
    assert_eq!(table.vacate(Ticket(3)), []);
    assert_eq!(table.vacate(Ticket(1)), [Ticket(2)]);
    assert_eq!(table.vacate(Ticket(4)), [Ticket(5)], "it gave up, and was all that was in the way");
}

#[test]
fn a_lease_that_expires_as_a_waiter_times_out_goes_to_the_waiter() {
    let mut table = LeaseTable::default();
    table.ask(ask(1, &whole("r"), None));
    table.confirm(Ticket(1), FencingToken(1), Some(ms(10)));
    table.ask(Ask { wait_until: Some(ms(10)), ..ask(2, &whole("r"), None) });
    assert!(!table.renew(FencingToken(1), ms(20), ms(10)), "an expired lease is not renewed");
    assert_eq!(table.expire(ms(10)), [Ticket(1)]);
    assert_eq!(table.vacate(Ticket(1)), [Ticket(2)]);
    assert_eq!(table.time_out(ms(10)), (vec![], vec![]));
}

#[test]
fn a_renewal_that_comes_to_rest_late_takes_nothing_back() {
    let mut table = LeaseTable::default();
    table.ask(ask(1, &whole("r"), None));
    table.confirm(Ticket(1), FencingToken(1), Some(ms(5)));
    assert!(table.renew(FencingToken(1), ms(14), ms(4)));
    assert!(table.renew(FencingToken(1), ms(9), ms(4)), "begun earlier");
    assert_eq!(table.expire(ms(10)), []);
    assert_eq!(table.expire(ms(14)), [Ticket(1)]);
}
