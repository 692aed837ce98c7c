-- FEEDBACK: what the caller thinks of an answer becomes evidence, once per call.
-- A call that was counted is counted anew with the caller's score, at the age it has by now; one that was not
-- (nobody had judged it) is counted now. That the place gets feedback at all is counted too ('judged').
--
-- KEYS  1 call  2 stage's evidence  3 workflow's  4 fleet's  5 the stats of the call's day
-- ARGV  1 score, 0 to 1  2-4 half-life of stage, workflow and fleet, in outcomes
-- Returns 'applied'; 'again' when this call has had its feedback; 'unknown' when there is no such settled call.
-- TTL   35 days for evidence; the others keep theirs
local call = read(KEYS[1], 'state', 'ref', 'score', 'n', 'n_workflow', 'n_fleet')
if call[1] ~= 'settled' or not call[2] then
  return 'unknown'
end
local score, ref, counted = tonumber(ARGV[1]), call[2], number(call[3], nil)
if redis.call('HSETNX', KEYS[1], 'feedback', ARGV[1]) == 0 then
  return 'again'
end

for level = 1, 3 do
  local key, half_life = KEYS[level + 1], tonumber(ARGV[level + 1])
  if not counted then
    evidence_observe(key, ref, half_life, score, nil)
  else
    local n, e = evidence_read(key, ref)
    local at = number(call[level + 3], e.seen)
    local change = (score - counted) * 0.5 ^ (math.max(0, e.seen - at) / half_life)
    change = math.max(-e.successes, math.min(e.failures, change))
    e.successes = e.successes + change
    e.failures = e.failures - change
    if call[level + 3] and at == e.seen and e.recent ~= '' then
      e.recent = string.sub(e.recent, 1, -2) .. (score >= 0.5 and '1' or '0')
    end
    if e.calls > 0 then
      evidence_write(key, ref, n, e)
    end
  end
end
for level = 1, 2 do
  telemetry_count(KEYS[level + 1], 'judged', 1)
  redis.call('EXPIRE', KEYS[level + 1], 3024000)
end

own(KEYS[5], 'hash')
telemetry_count(KEYS[5], ref .. '|scored', 1)
telemetry_count(KEYS[5], ref .. '|score_milli', math.floor(score * 1000 + 0.5))
redis.call('EXPIRE', KEYS[5], 3024000)
return 'applied'
