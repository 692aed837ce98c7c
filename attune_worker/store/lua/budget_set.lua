-- BUDGET_SET: an operator sets a budget's limit for the running fleet, or goes back to the configured one.
-- Repeatable: it leaves the budget as it says.
--
-- KEYS  1 budget
-- ARGV  1 JSON: what budget.lua's budget_set takes as its wish
-- Returns until when it holds, in ms (0: for good)
-- TTL   see budget.lua
return budget_set(KEYS[1], now_in_ms(), cjson.decode(ARGV[1]))
